"""The gate: what a provider computes is compared with the float64 reference before it is timed.

Per channel, the largest absolute error relative to the sum of the magnitudes that made the value
(as `tests/common/cases.py` measures it), against a bound that any sound implementation meets: 64
and sqrt(n) units of the accumulation type, for that is how plain sums of n values round, times
1 + |mean| / std, for deviations are as exact as the mean; and 4 units of the result's type where
that is a 16-bit one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference

from .cases import DTYPES, Case

EPS, MOMENTUM = 1e-5, 0.1
Results = dict[str, Tensor]
#: What each pass is held to.
FORWARD = ("y", "running_mean", "running_var")
BACKWARD = ("dx", "dresidual", "dweight", "dbias")
CHECKED = {"fwd": FORWARD, "eval": ("y",), "bwd": BACKWARD, "fwd+bwd": FORWARD + BACKWARD}


@dataclass
class Inputs:
    """The tensors that every provider of a case gets. (C,) vectors are of the accumulation type."""

    x: Tensor  #: (N, C, ...)
    dy: Tensor
    residual: Tensor | None
    weight: Tensor  #: (C,), and so the rest
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@dataclass
class Reference:
    """What is right, by name, and the scale (C,) that errors of it are relative to."""

    right: Results
    scale: Results
    error: Tensor  #: (C,): what rounding of the accumulation type is allowed, relative to the scale


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random tensors of the case's shape, dtype and layout; the same ones for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, channels = DTYPES[case.dtype], case.shape[1]
    drawn = accumulation_type(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=drawn)

    def large(mean: float, std: float) -> Tensor:
        t = normal(*case.shape).mul_(std).add_(mean)
        return t.to(dtype).contiguous(memory_format=case.memory_format)

    return Inputs(
        large(0.5, 1.5),
        large(0.01, 1.0),
        large(0.0, 1.0) if case.op == "bn_add_relu" else None,
        normal(channels).abs() + 0.5,
        normal(channels) * 0.5,
        normal(channels),
        normal(channels).square() + 0.5,
    )


def _largest(t: Tensor) -> Tensor:
    """(C,): the largest magnitude of each channel of (N, C, ...)."""
    return t.abs().transpose(0, 1).flatten(1).amax(1)


def _vector(t: Tensor, like: Tensor) -> Tensor:
    return t.double().reshape(1, -1, *[1] * (like.dim() - 2))


def reference(case: Case, i: Inputs, *, training: bool) -> Reference:
    """Of forward and, in training, of backward.

    Where the sign that ReLU looks at is within rounding of 0, either gradient is right: dy is set
    to 0 in these places, here and for the providers, since it is the same tensor.
    """
    f = batch_norm_reference(
        i.x, i.running_mean, i.running_var, i.weight, i.bias, training, MOMENTUM, EPS
    )
    xhat = (i.x.double() - _vector(f.mean, i.x)) * _vector(f.rstd, i.x)
    weight, count = i.weight.double().abs(), i.x.numel() // i.x.shape[1]
    u = torch.finfo(accumulation_type(i.x.dtype)).eps / 2
    error = (64 + math.sqrt(count)) * u * (1 + f.mean.abs() * f.rstd)
    right, scale = {"y": f.y}, {"y": weight * _largest(xhat) + i.bias.double().abs()}
    if i.residual is not None:
        right["y"] = f.y + i.residual.double()
        scale["y"] = scale["y"] + _largest(i.residual.double())
    if not training:
        if case.op != "bn":
            right["y"] = right["y"].relu()
        return Reference(right, scale, error)
    dy = i.dy.double()
    if case.op != "bn":
        unsure = right["y"].abs() <= _vector(_allowed(error, i.x.dtype) * scale["y"], i.x)
        i.dy[unsure] = 0
        dy = i.dy.double() * (right["y"] > 0)
        right["y"] = right["y"].relu()
    b = batch_norm_backward_reference(dy, i.x, None, None, i.weight, True, EPS)
    dims = [0, *range(2, i.x.dim())]
    products = xhat * dy
    reach = _largest(dy) + dy.mean(dims).abs() + _largest(xhat) * products.mean(dims).abs()
    assert f.running_mean is not None  # they were given
    assert f.running_var is not None
    right |= {"running_mean": f.running_mean, "running_var": f.running_var}
    right |= {"dx": b.dx, "dweight": b.dweight, "dbias": b.dbias}
    scale |= {
        "running_mean": MOMENTUM * (f.mean.abs() + f.var.sqrt()) + i.running_mean.double().abs(),
        "running_var": MOMENTUM * f.var + i.running_var.double().abs(),
        "dx": weight * f.rstd * reach,
        "dweight": products.abs().sum(dims),
        "dbias": dy.abs().sum(dims),
    }
    if i.residual is not None:
        right["dresidual"], scale["dresidual"] = dy, _largest(dy)
    return Reference(right, scale, error)


def _allowed(error: Tensor, dtype: torch.dtype) -> Tensor:
    """(C,): the largest error of a result of that dtype, relative to its scale, that passes."""
    return error + (2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)


def wrong(results: Results, r: Reference) -> str | None:
    """None where all results are right; else one line with the worst of them."""
    worst, text = 1.0, None
    for name, result in results.items():
        right, scale = r.right[name], r.scale[name]
        if result.shape != right.shape:
            return f"{name} has shape {tuple(result.shape)}, not {tuple(right.shape)}"
        error = (result.double() - right).abs()
        error = error if error.dim() == 1 else _largest(error)
        # 0/0 is right: a channel in which there is nothing to add up.
        relative = torch.where(error == 0, error, error / scale).nan_to_num(torch.inf)
        times = (relative / _allowed(r.error, result.dtype)).max().item()
        if times > worst:
            worst = times
            text = (
                f"{name} is off by {relative.max():.1e} of its scale ({times:.3g} times the bound)"
            )
    return text
