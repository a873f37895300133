"""Whether two implementations did the same: for tests that compare rules, not digits. How exact a
result is, `cases` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Of the largest value. A wrong rule shows as a difference of the size of the values. Not for 16
#: bits, where native's rounding can be as large.
CLOSE = {torch.float64: 1e-9, torch.float32: 0.05}


def assert_like(
    mine: dict[str, Any], theirs: dict[str, Any], kind: torch.dtype, *, strides: bool = True
) -> None:
    """Same names, shapes, dtypes and strides; in float32 and float64 also infinite and nan in the
    same places, and close values. ``kind``: the dtype of the input, in which both rounded."""
    assert mine.keys() == theirs.keys()
    most = max((t.numel() for t in theirs.values()), default=0)
    for name, right in theirs.items():
        got = mine[name]
        assert (got.dtype, got.shape) == (right.dtype, right.shape), name
        if right.numel() == 0:
            continue
        # Dimensions of one element leave a choice of strides, and native's depends on those of x.
        if strides and 1 not in right.shape:
            assert got.stride() == right.stride(), f"{name}: strides"
        if not right.is_floating_point():
            assert torch.equal(got, right), f"{name}: {got} for {right}"
            continue
        if kind in CLOSE and right.dtype in CLOSE:
            # Gradients of parameters are sums of so many values of about 1.
            count = most / right.numel() if name.startswith(("dweight", "dbias")) else 1
            assert_values(name, got, right, max(CLOSE[kind], CLOSE[right.dtype]), count)


def assert_values(name: str, got: Tensor, right: Tensor, least: float, size: float) -> None:
    """Within ``least`` of the largest value, or of ``size``."""
    a, b = got.detach().double(), right.detach().double()
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: nan"
    assert torch.equal(a.isinf(), b.isinf()), f"{name}: inf"
    finite = b.isfinite()
    if finite.any():
        off = (a - b)[finite].abs().max().item()
        size = max(b[finite].abs().max().item(), size)
        assert off <= least * size, f"{name}: off by {off:.3g}, largest {size:.3g}"
