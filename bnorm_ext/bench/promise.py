"""The accuracy promise of docs/numerics.md: how errors are measured, and how large they may be.

Everything is compared with `bnorm_ext.reference` in float64, per channel, as the largest absolute
error relative to a scale: the sum of the magnitudes that were added to make the value. For sums may
cancel (dx of a constant dy is 0, and so may be the sum of dy), but the rounding of what cancels
stays. With xhat the normalised x, z = weight * xhat + bias + residual, y = act(z) and
g = dy * act'(z):

    z             Z = |weight| * max|xhat| + |bias| + max|residual|
    y             a * Z
    g             |dy| * (a + b * Z)
    dresidual     the largest of g
    dx            |weight| * rstd * (the largest of g + |mean(g)| + max|xhat| * |mean(g * xhat)|),
                  in inference the first of the three alone
    dweight       the sum of g * |xhat|
    dbias         the sum of g
    running_mean  |momentum| * (|mean| + std) + |1 - momentum| * |running_mean|
    running_var   |momentum| * unbiased var + |1 - momentum| * |running_var|

a is the largest slope of the activation, b its largest curvature: z is as exact as Z, and y sees
the error of z through the slope, g through the curvature. They are 1 and 0 but for silu and
hardswish.

What is promised, with u the unit roundoff of the result's dtype:

(1) the largest error of a tensor is at most max(1.25 * native's, 4u). The float64 reference is
    itself right to a few of its own u only, hence 4u more for float64 results;
(2) what is computed in float32, 16-bit data too, has in each channel an error of at most 6v with
    v = 2^-24, whatever the mean, and u more where the result is rounded to 16 bits at the end.
    Where the terms come from: subtraction, rstd, the product of weight and rstd, and the fused
    multiply-add round once each, 4v; 2v for what sums lose. An addition or an activation rounds
    too: `roundings`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnorm_ext.activations import compose
from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference

Results = dict[str, Tensor]

#: Of the activations: where the derivative jumps, and the largest slope and curvature.
KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3),
}  # fmt: skip
SLOPE = {"silu": 1.1, "hardswish": 1.5}
CURVATURE = {"silu": 0.5, "hardswish": 1 / 3}


@dataclasses.dataclass
class Case:
    """One call of batch norm and of its backward."""

    x: Tensor
    dy: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


class Epilogue(NamedTuple):
    """What follows the normalisation."""

    residual: Tensor | None = None
    act: str = "identity"
    slope: float = 0.01  #: of leaky_relu


PLAIN = Epilogue()


class Measure(NamedTuple):
    reference: Results
    scale: Results  # (C,) each
    ratio: Tensor  # (C,): |mean| / std, infinite where std alone is 0


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(t: Tensor) -> Tensor:
    """The largest magnitude of each channel of (N, C, ...); magnitudes of (C,) as they are."""
    return t.double().abs() if t.dim() == 1 else t.double().abs().transpose(0, 1).flatten(1).amax(1)


def _broadcast(t: Tensor, like: Tensor) -> Tensor:
    return t.double().reshape(1, -1, *[1] * (like.dim() - 2))


def pre_activation(c: Case, e: Epilogue = PLAIN) -> Tensor:
    """z in float64."""
    z = batch_norm_reference(
        c.x, c.running_mean, c.running_var, c.weight, c.bias, c.training, 0, c.eps, careful=True
    ).y
    return z if e.residual is None else z + e.residual.double()


def slope_at(z: Tensor, e: Epilogue) -> Tensor:
    """act'(z). Torch's of silu takes 1 - sigmoid(z), of which little is left where z is large."""
    if e.act == "silu":
        return z.sigmoid() * (1 + z * (-z).sigmoid())
    z = z.detach().requires_grad_()
    return torch.autograd.grad(compose(z, None, e.act, e.slope).sum(), z)[0]


def measure(c: Case, e: Epilogue = PLAIN) -> Measure:
    """The float64 results of a case and the scales that errors are relative to."""
    statistics = (c.running_mean, c.running_var)
    f = batch_norm_reference(
        c.x, *statistics, c.weight, c.bias, c.training, c.momentum, c.eps, careful=True
    )
    plain = batch_norm_reference(c.x, *statistics, None, None, c.training, 0, c.eps, careful=True)
    dims = [0, *range(2, c.x.dim())]
    z, dy, xhat = pre_activation(c, e), c.dy.double(), per_channel(plain.y)
    g = dy if e.act == "identity" else dy * slope_at(z, e)
    b = batch_norm_backward_reference(
        g, c.x, *statistics, c.weight, c.training, c.eps, careful=True
    )
    weight = torch.ones_like(f.mean) if c.weight is None else c.weight.double().flatten().abs()
    of_z = weight * xhat
    if c.bias is not None:
        of_z = of_z + c.bias.double().flatten().abs()
    if e.residual is not None:
        of_z = of_z + per_channel(e.residual)
    steepest, bent = SLOPE.get(e.act, 1.0), CURVATURE.get(e.act, 0.0)
    of_g = dy.abs() * (steepest + bent * _broadcast(of_z, c.x))
    sent = per_channel(of_g)
    if c.training:
        sent = sent + g.mean(dims).abs() + xhat * (plain.y * g).mean(dims).abs()
    reference = {"y": compose(z, None, e.act, e.slope), "dx": b.dx}
    scale = {"y": steepest * of_z, "dx": weight * f.rstd * sent}
    if e.residual is not None:
        reference["dresidual"], scale["dresidual"] = g, per_channel(of_g)
    if c.weight is not None:
        reference["dweight"], scale["dweight"] = b.dweight, (of_g * plain.y.abs()).sum(dims)
    if c.bias is not None:
        reference["dbias"], scale["dbias"] = b.dbias, of_g.sum(dims)
    m = abs(c.momentum) if c.training else 0.0
    keep = abs(1 - c.momentum) if c.training else 1.0
    if f.running_mean is not None and c.running_mean is not None:
        reference["running_mean"] = f.running_mean
        scale["running_mean"] = (
            m * (f.mean.abs() + f.var.sqrt()) + keep * c.running_mean.double().abs()
        )
    if f.running_var is not None and c.running_var is not None:
        count = c.x.numel() / c.x.shape[1]
        unbiased = f.var * (count / (count - 1)) if c.training else f.var
        reference["running_var"] = f.running_var
        scale["running_var"] = m * unbiased + keep * c.running_var.double().abs()
    return Measure(reference, scale, (f.mean.abs() / f.var.sqrt()).nan_to_num(0, torch.inf))


def errors(results: Results, m: Measure) -> Results:
    """Relative to the scale, per channel. What is not finite, though it should be, is infinitely
    wrong; what exceeds the range of its dtype has to be infinite."""
    found = {}
    for name, right in m.reference.items():
        beyond = right.to(results[name].dtype).isinf()
        result = results[name].double().reshape(right.shape)
        e = per_channel(
            torch.where(beyond & (result == right.sign() * torch.inf), 0, result - right)
        )
        # Half the spacing of subnormals is lost however small the scale is.
        info = torch.finfo(results[name].dtype)
        e = (e - info.smallest_normal * info.eps / 2).clamp_min(0)
        e = torch.where(e == 0, e, e / m.scale[name])
        found[name] = e.nan_to_num(torch.inf)
    return found


def roundings(name: str, e: Epilogue) -> int:
    """How many v an addition and an activation add to bound (2)."""
    if e.act in SLOPE and (e.act == "silu" or name != "y"):
        return 6  # exp, quotients and products
    return 0 if e.act == "identity" and e.residual is None else 2


class Share(NamedTuple):
    """Errors of one result, in units of u, and relative to what the promise allows."""

    ours: float
    native: float
    beside: float  #: the share of bound (1)
    alone: float  #: the share of bound (2); 0 for float64


def shares(ours: Results, native: Results, m: Measure, e: Epilogue = PLAIN) -> dict[str, Share]:
    """Both bounds, by result: kept where no share is above 1."""
    found = {}
    mine, theirs = errors(ours, m), errors(native, m)
    v = unit_roundoff(torch.float32)
    for name in m.reference:
        dtype = ours[name].dtype
        assert dtype == native[name].dtype, name
        u = unit_roundoff(dtype)
        worst, other = mine[name].max().item(), theirs[name].max().item()
        allowed = max(1.25 * other, 4 * u) + (4 * u if dtype == torch.float64 else 0)
        alone = 0.0
        if dtype != torch.float64:
            fine = (6 + roundings(name, e)) * v + (u if u > v else 0)
            alone = worst / fine
        found[name] = Share(worst / u, other / u, worst / allowed, alone)
    return found


def away_from_kinks(c: Case, e: Epilogue) -> Case:
    """dy is 0 where z is so close to a kink that rounding decides on its side: either gradient is
    right there."""
    kinks = KINKS.get(e.act, ())
    if not kinks:
        return c
    m, z = measure(c, Epilogue(e.residual)), pre_activation(c, e)
    u = unit_roundoff(accumulation_type(c.x.dtype))
    close = _broadcast(32 * u * (1 + m.ratio) * m.scale["y"], c.x)
    keep = torch.ones_like(z, dtype=torch.bool)
    for kink in kinks:
        keep &= (z - kink).abs() > close
    return c.but(dy=torch.where(keep, c.dy, 0).to(c.dy.dtype))
