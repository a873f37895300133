"""What the tests of the operators share: cases, their results by ours, native and in float64, and
how far apart these may be.

How errors are measured. Everything is compared with `bnorm_ext.reference` in float64, per channel,
as the largest absolute error relative to a scale: the sum of the magnitudes that were added to make
the value, for sums may cancel (dx of a constant dy is 0) but the rounding of what cancels stays.

    y             |weight| * max|xhat| + |bias|
    dx            |weight| * rstd * (max|dy| + |mean(dy)| + max|xhat| * |mean(dy * xhat)|), in
                  inference the first of the three alone
    dweight       sum |dy * xhat|
    dbias         sum |dy|
    running_mean  |momentum| * (|mean| + std) + |1 - momentum| * |running_mean|
    running_var   |momentum| * unbiased var + |1 - momentum| * |running_var|

What is promised, with u the unit roundoff of the result's dtype:

(1) the largest error of a tensor is at most max(1.25 * native's, 4u); the float64 reference is
    itself right to a few of its own u only, hence 4u more for float64 results;
(2) what is computed in float32, 16-bit data too, has in each channel an error of at most
    (2 (1 + r) + 4) v with v = 2^-24 and r = |mean| / sqrt(var), and u more where the result
    is rounded to 16 bit at the end. Where the terms come from: subtraction, rstd, the product of
    weight and rstd, and the fused multiply-add round once each, 4v; the mean is rounded by
    v * |mean|, which is v * r relative to the deviations, and again as much for what sums lose.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext
from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOTH: dict[str, Callable[..., Tensor]] = {"ours": bnorm_ext.batch_norm, "native": F.batch_norm}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

Results = dict[str, Tensor]


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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int, mean: float = 0, std: float = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64) * std + mean


def case(
    x: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    parameters: torch.dtype | None = None,
    dy: Tensor | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Case:
    """x rounded to dtype in that layout, with random parameters, running statistics and dy.

    Parameters are of the accumulation type unless another one is given.
    """
    C = x.shape[1]
    dy = normal(tuple(x.shape), seed + 1) if dy is None else dy
    kind = parameters or accumulation_type(dtype)
    x, dy = (t.to(dtype).contiguous(memory_format=FORMATS[layout]) for t in (x, dy))
    vectors = {
        "running_mean": normal((C,), seed + 2),
        "running_var": normal((C,), seed + 3).square() + 0.5,
        "weight": normal((C,), seed + 4).abs() + 0.1,
        "bias": normal((C,), seed + 5),
    }
    given = {name: kwargs.pop(name, t) for name, t in vectors.items()}
    return Case(x, dy, **{n: t if t is None else t.to(kind) for n, t in given.items()}, **kwargs)


def run(
    function: Callable[..., Tensor], c: Case, residual: Tensor | None = None, **options: Any
) -> Results:
    """Forward and backward on copies; everything that came out, by name. ``options`` are passed on,
    and so is a copy of the residual where there is one."""
    leaves = {"x": c.x, "residual": residual, "weight": c.weight, "bias": c.bias}
    # Not clone(): the strides of x are part of the case.
    given = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    buffers = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
    if residual is not None:
        options["residual"] = given["residual"]
    y = function(
        given["x"], *buffers, given.get("weight"), given.get("bias"), c.training, c.momentum, c.eps,
        **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(given.values()), c.dy)
    names = [f"d{name}" for name in given]
    results = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    for name, buffer in zip(("running_mean", "running_var"), buffers, strict=True):
        if buffer is not None:
            results[name] = buffer
    return results


def kinds(t: Tensor) -> dict[str, int]:
    """How many values are finite, inf, -inf and nan."""
    names = {True: "finite"}
    return dict(
        collections.Counter(names.get(v - v == 0, str(v)) for v in t.double().flatten().tolist())
    )


def per_channel(t: Tensor) -> Tensor:
    """The largest magnitude of each channel of (N, C, ...); magnitudes of (C,) as they are."""
    return t.double().abs() if t.dim() == 1 else t.double().abs().transpose(0, 1).flatten(1).amax(1)


class Measure(NamedTuple):
    reference: Results
    scale: Results  # (C,) each
    ratio: Tensor  # (C,): |mean| / std, infinite where std alone is 0


def measure(c: Case) -> Measure:
    """The float64 results of a case and the scales that errors are relative to."""
    f = batch_norm_reference(
        c.x, c.running_mean, c.running_var, c.weight, c.bias, c.training, c.momentum, c.eps
    )
    b = batch_norm_backward_reference(
        c.dy, c.x, c.running_mean, c.running_var, c.weight, c.training, c.eps
    )
    plain = batch_norm_reference(
        c.x, c.running_mean, c.running_var, None, None, c.training, 0, c.eps
    )
    dims = [0, *range(2, c.x.dim())]
    products = plain.y * c.dy.double()
    weight = torch.ones_like(f.mean) if c.weight is None else c.weight.double().flatten().abs()
    sent = per_channel(c.dy)
    if c.training:
        sent = sent + c.dy.double().mean(dims).abs()
        sent = sent + per_channel(plain.y) * products.mean(dims).abs()
    reference = {"y": f.y, "dx": b.dx}
    scale = {
        "y": weight * per_channel(plain.y),
        "dx": weight * f.rstd * sent,
    }
    if c.weight is not None:
        reference["dweight"], scale["dweight"] = b.dweight, products.abs().sum(dims)
    if c.bias is not None:
        reference["dbias"], scale["dbias"] = b.dbias, c.dy.double().abs().sum(dims)
        scale["y"] = scale["y"] + c.bias.double().flatten().abs()
    m = abs(c.momentum) if c.training else 0.0
    keep = abs(1 - c.momentum) if c.training else 1.0
    if f.running_mean is not None and c.running_mean is not None:
        reference["running_mean"] = f.running_mean
        scale["running_mean"] = (
            m * (f.mean.abs() + f.var.sqrt()) + keep * c.running_mean.double().abs()
        )
    if f.running_var is not None and c.running_var is not None:
        unbiased = f.var * (c.x.numel() / c.x.shape[1] / (c.x.numel() / c.x.shape[1] - 1))
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


def assert_exact(c: Case, y: Tensor) -> None:
    """y of float32 training within 4 units of the last place of its largest values, whatever the
    mean is."""
    right = batch_norm_reference(c.x, None, None, c.weight, c.bias, True, 0, c.eps).y
    dims = [d for d in range(y.dim()) if d != 1]
    error = (y.double() - right).abs().amax(dims)
    assert (error < 4 * 2**-24 * right.abs().amax(dims).clamp(min=1)).all()


def assert_promise(
    c: Case,
    *,
    beside_native: bool = True,
    ours: Results | None = None,
    native: Results | None = None,
) -> dict[str, tuple[float, float]]:
    """Asserts (1) and (2) of this file for every result; returns (ours, native's) in units of u.

    beside_native=False leaves out (1), for cases that native gets right by luck alone. `ours`,
    `native`: the results, where they come from elsewhere than from a call on the CPU.
    """
    m = measure(c)
    ours = run(BOTH["ours"], c) if ours is None else ours
    native = run(BOTH["native"], c) if native is None else native
    ours_errors, native_errors = errors(ours, m), errors(native, m)
    seen, broken = {}, []
    for name in m.reference:
        dtype = ours[name].dtype
        assert dtype == native[name].dtype, name
        u, v = unit_roundoff(dtype), unit_roundoff(torch.float32)
        mine, theirs = ours_errors[name].max().item(), native_errors[name].max().item()
        seen[name] = (mine / u, theirs / u)
        text = f"{name}: error {mine / u:.3g} u, native's {theirs / u:.3g} u"
        allowed = max(1.25 * theirs, 4 * u) + (4 * u if dtype == torch.float64 else 0)
        if beside_native and mine > allowed:
            broken.append(f"{text}; more than max(1.25 x native's, 4 u)")
        if dtype != torch.float64:
            fine = (2 * (1 + m.ratio) + 4) * v + (u if u > v else 0)
            worst = (ours_errors[name] / fine).max().item()
            if worst > 1:
                broken.append(f"{text}; {worst:.3g} x (2 (1 + |mean|/std) + 4) u in a channel")
    assert not broken, "\n" + "\n".join(broken)
    return seen
