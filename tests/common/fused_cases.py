"""Cases of batch norm with residual and activation, their results and how far these may be off:
`bnorm_ext/bench/promise.py`, native being torch's own operations one after the other, each of which
rounds.

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
from bnorm_ext.bench import promise
from tests.common import cases
from tests.common.cases import Case, Results, assert_kept, case, normal

ACTS = ["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish"]
KINKS = promise.KINKS
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
    for kink in KINKS.get(act, ()):
        near |= (z - kink).abs() < 1e-3
    c.dy.masked_fill_(near, 0)
    return f


def epilogue(f: Fused) -> promise.Epilogue:
    return promise.Epilogue(f.residual, f.act, SLOPE)


def pre_activation(f: Fused) -> Tensor:
    """z in float64."""
    return promise.pre_activation(f.c, epilogue(f))


def run(function: Callable[..., Tensor], f: Fused) -> Results:
    """Forward and backward on copies; everything that came out, by name."""
    return cases.run(function, f.c, f.residual, act=f.act)


def slope_of(z: Tensor, act: str) -> Tensor:
    """act'(z)."""
    return promise.slope_at(z, promise.Epilogue(None, act, SLOPE))


def assert_close(f: Fused, mine: Results | None = None, *, beside_native: bool = True) -> None:
    """Asserts (1), unless beside_native is False, and (2)."""
    mine = run(ours, f) if mine is None else mine
    theirs = run(native, f)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].shape == theirs[name].shape, name
    e = epilogue(f)
    assert_kept(
        promise.shares(mine, theirs, promise.measure(f.c, e), e), beside_native=beside_native
    )
