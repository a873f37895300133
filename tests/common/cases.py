"""What the tests of the operators share: cases, their results by ours, native and in float64, and
how far apart these may be: `bnorm_ext/bench/promise.py` says how errors are measured and what is
promised."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext
from bnorm_ext.bench.promise import (
    Case,
    Results,
    Share,
    accumulation_type,
    errors,
    measure,
    per_channel,
    shares,
    unit_roundoff,
)
from bnorm_ext.reference import batch_norm_reference

__all__ = [
    "Case",
    "Results",
    "accumulation_type",
    "errors",
    "measure",
    "per_channel",
    "unit_roundoff",
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOTH: dict[str, Callable[..., Tensor]] = {"ours": bnorm_ext.batch_norm, "native": F.batch_norm}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def assert_exact(c: Case, y: Tensor) -> None:
    """y of float32 training within 4 units of the last place of its largest values, whatever the
    mean is."""
    right = batch_norm_reference(c.x, None, None, c.weight, c.bias, True, 0, c.eps).y
    dims = [d for d in range(y.dim()) if d != 1]
    error = (y.double() - right).abs().amax(dims)
    assert (error < 4 * 2**-24 * right.abs().amax(dims).clamp(min=1)).all()


def assert_kept(found: dict[str, Share], *, beside_native: bool = True) -> None:
    """Asserts both bounds of promise.py, or the second alone."""
    broken = []
    for name, share in found.items():
        text = f"{name}: error {share.ours:.3g} u, native's {share.native:.3g} u"
        if beside_native and not share.beside <= 1:
            broken.append(f"{text}; {share.beside:.3g} x bound (1), beside native")
        if not share.alone <= 1:
            broken.append(f"{text}; {share.alone:.3g} x bound (2), of a channel alone")
    assert not broken, "\n" + "\n".join(broken)


def assert_promise(
    c: Case,
    *,
    beside_native: bool = True,
    ours: Results | None = None,
    native: Results | None = None,
) -> dict[str, tuple[float, float]]:
    """Asserts (1) and (2) of promise.py for every result; returns (ours, native's) in units of u.

    beside_native=False leaves out (1), for cases that native gets right by luck alone. `ours`,
    `native`: the results, where they come from elsewhere than from a call on the CPU.
    """
    m = measure(c)
    ours = run(BOTH["ours"], c) if ours is None else ours
    native = run(BOTH["native"], c) if native is None else native
    found = shares(ours, native, m)
    assert_kept(found, beside_native=beside_native)
    return {name: (share.ours, share.native) for name, share in found.items()}
