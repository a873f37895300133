"""The gate: the results of a provider are compared with the float64 reference before it is timed.

The error of a channel is its largest absolute error, relative to the sum of the magnitudes of the
terms of the value (as `promise.py` measures it). The bound is one that any sound
implementation meets: 64 + sqrt(n) units of roundoff of the accumulation type, because that is how a
plain sum of n values rounds, times 1 + |mean| / std, because deviations are as exact as the mean.
For results in a 16-bit type, 4 units of that type are added.
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
#: The results that are compared, by pass.
FORWARD = ("y", "running_mean", "running_var")
BACKWARD = ("dx", "dresidual", "dweight", "dbias")
CHECKED = {"fwd": FORWARD, "eval": ("y",), "bwd": BACKWARD, "fwd+bwd": FORWARD + BACKWARD}


@dataclass
class Inputs:
    """The tensors that every provider of a case gets. Vectors are in the accumulation type."""

    x: Tensor  #: (N, C, ...)
    dy: Tensor  #: (N, C, ...)
    residual: Tensor | None  #: (N, C, ...)
    weight: Tensor  #: (C,)
    bias: Tensor  #: (C,)
    running_mean: Tensor  #: (C,)
    running_var: Tensor  #: (C,)


@dataclass
class Reference:
    """The right results by name, and how far others may be off."""

    right: Results
    scale: Results  #: (C,) each: the magnitude that errors of a result are relative to
    error: Tensor  #: (C,): the allowed rounding error of the accumulation type, relative to scale


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
    """The reference of forward and, in training, of backward.

    Where the argument of ReLU is 0 up to rounding, either gradient is right. dy is set to 0 there,
    in place, so that the providers get it too.
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
    """(C,): the largest allowed error of a result of that dtype, relative to its scale."""
    return error + (2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)


def wrong(results: Results, r: Reference) -> str | None:
    """None if all results are right; else one line about the worst of them."""
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
