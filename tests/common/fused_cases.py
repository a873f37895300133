"""Cases of batch norm with residual and activation, their results and how far these may be off.

Compared with float64, per channel, like in `cases.py`; the scales there, with g = dy * act'(z) in
the place of dy, and with the residual's magnitude added to y's. The bounds have more terms:

(1) at most max(1.25 * native's, 4u) as there, native being torch's own operations one after the
    other, each of which rounds;
(2) in float32, (2 (1 + r) + 4) v of the normalisation, 2v for the addition and the activation (8v
    for silu, in which exp and a division round too); gradients see the error of z through act'',
    at most 1/2, and round once more for the product: 12v.

Where z is so near to a kink that rounding decides on its side, either gradient is right: dy is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext
from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference
from tests.common import cases
from tests.common.cases import Case, Results, case, normal, per_channel, unit_roundoff

ACTS = ["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish"]
KINKS = {"relu": [0.0], "relu6": [0.0, 6.0], "leaky_relu": [0.0], "hardswish": [-3.0, 3.0]}
SLOPE = 0.1


def activate(z: Tensor, act: str) -> Tensor:
    """Torch's own."""
    if act == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    return z if act == "identity" else getattr(F, act)(z)


@dataclasses.dataclass
class Fused:
    """One call, and its backward."""

    c: Case
    residual: Tensor | None
    act: str


def native(x: Tensor, *given: Any, act: str, residual: Tensor | None = None) -> Tensor:
    y = F.batch_norm(x, *given)
    return activate(y if residual is None else y + residual, act)


def ours(x: Tensor, *given: Any, act: str, residual: Tensor | None = None) -> Tensor:
    return bnorm_ext.batch_norm(x, *given, residual=residual, act=act, negative_slope=SLOPE)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    act: str,
    with_residual: bool,
    training: bool,
    seed: int = 0,
) -> Fused:
    if layout == "channels_last" and len(shape) == 5:
        layout = "channels_last_3d"
    x = normal(shape, seed + 20, mean=0.5, std=2)
    c = case(x, dtype, layout=layout, training=training, seed=seed)
    residual = None
    if with_residual:
        # Not zeros_like(c.x): the strides of x are kept.
        residual = torch.empty_like(c.x).copy_(normal(shape, seed + 21))
    f = Fused(c, residual, act)
    z = pre_activation(f)
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(act, []):
        near |= (z - kink).abs() < 1e-3
    c.dy.masked_fill_(near, 0)
    return f


def pre_activation(f: Fused) -> Tensor:
    c = f.c
    z = batch_norm_reference(
        c.x, c.running_mean, c.running_var, c.weight, c.bias, c.training, c.momentum, c.eps
    ).y
    return z if f.residual is None else z + f.residual.double()


def run(function: Callable[..., Tensor], f: Fused) -> Results:
    """Forward and backward on copies; everything that came out, by name."""
    return cases.run(function, f.c, f.residual, act=f.act)


def slope_of(z: Tensor, act: str) -> Tensor:
    """act'(z). Torch's of silu takes 1 - sigmoid(z), of which little is left where z is large."""
    if act == "silu":
        return z.sigmoid() * (1 + z * (-z).sigmoid())
    z = z.detach().requires_grad_()
    return torch.autograd.grad(activate(z, act).sum(), z)[0]


def reference(f: Fused) -> tuple[Results, Results, Tensor]:
    """In float64: results, their scales, |mean| / std."""
    c = f.c
    z = pre_activation(f)
    y = activate(z, f.act)
    g = c.dy.double() * slope_of(z, f.act)
    statistics = (c.running_mean, c.running_var)
    n = batch_norm_reference(c.x, *statistics, None, None, c.training, 0, c.eps)
    b = batch_norm_backward_reference(g, c.x, *statistics, c.weight, c.training, c.eps)
    dims = [0, *range(2, c.x.dim())]
    weight, bias = (t.double().abs() for t in (c.weight, c.bias))
    xhat, products = per_channel(n.y), n.y * g
    # act' of silu and hardswish is 1.1 and 1.5 at most.
    sent = 1.5 * per_channel(c.dy)
    if c.training:
        sent = sent + g.mean(dims).abs() + xhat * products.mean(dims).abs()
    right = {"y": y, "dx": b.dx, "dweight": b.dweight, "dbias": b.dbias}
    scale = {
        "y": weight * xhat + bias,
        "dx": weight * n.rstd * sent,
        "dweight": (n.y * c.dy.double()).abs().sum(dims),
        "dbias": c.dy.double().abs().sum(dims),
    }
    if f.residual is not None:
        right["dresidual"], scale["dresidual"] = g, 1.5 * per_channel(c.dy)
        scale["y"] = scale["y"] + per_channel(f.residual)
    return right, scale, n.mean.abs() * n.rstd


def assert_close(f: Fused, mine: Results | None = None, *, beside_native: bool = True) -> None:
    """Asserts (1), unless beside_native is False, and (2)."""
    right, scale, r = reference(f)
    mine = run(ours, f) if mine is None else mine
    theirs = run(native, f)
    assert mine.keys() == theirs.keys()
    broken = []
    for name, expected in right.items():
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].shape == theirs[name].shape, name
        u, v = unit_roundoff(mine[name].dtype), unit_roundoff(torch.float32)
        # A channel of which every dy is 0 has no scale, and no error.
        error, other = (
            (per_channel(t[name].double() - expected) / scale[name].clamp_min(1e-300))
            for t in (mine, theirs)
        )
        allowed = max(1.25 * other.max().item(), (8 if u < 1e-12 else 4) * u)
        if beside_native and not error.max() <= allowed:
            broken.append(f"{name}: {error.max() / u:.3g} u, native {other.max() / u:.3g} u")
        if u > 1e-12:
            fine = (2 * (1 + r) + 4 + (2 if name == "y" and f.act != "silu" else 12)) * v
            fine = fine + (u if u > v else 0)
            if not (error <= fine).all():
                broken.append(f"{name}: {(error / fine).max():.3g} x the bound of float32")
    assert not broken, "\n".join(broken)
