"""Sizes beyond 32-bit offsets, and beyond the 65,535 blocks that a CUDA grid has in y and z.

Those of 2^31 elements and more need 13 GB and some minutes: `BNORM_EXT_BIG=1 pytest -m big`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import bnorm_ext
from tests.common.cases import FORMATS, assert_promise, case, normal

bf16, f64 = torch.bfloat16, torch.float64
N, C, REPEATS = 3, 5, 4096
ROWS = 8 * 4373  # values of a pattern
assert N * C * REPEATS * ROWS >= 2**31


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(70001, 2, 3, 1), (2, 70001, 1, 3)], ids=str)
def test_more_than_65535(shape, layout):
    assert_promise(case(normal(shape, 0), layout=layout))


def test_more_than_65535_rows_and_channels():
    assert_promise(case(normal((70001, 3), 0)))
    assert_promise(case(normal((3, 70001), 0)))


def patterned(seed: int, layout: str) -> tuple[Tensor, Tensor]:
    """(N, C, 32768, 4373), in which each channel repeats its pattern, and the patterns (C, ROWS):
    all sums are known from those of one pattern."""
    patterns = (normal((C, ROWS), seed) * torch.arange(1, C + 1)[:, None] + 0.5).to(bf16)
    shape = (N, C, REPEATS * 8, ROWS // 8)
    t = torch.empty(shape, dtype=bf16, memory_format=FORMATS[layout])
    for n in range(N):
        for c in range(C):
            blocks(t, n, c).copy_(patterns[c].view(1, 8, -1))
    return t, patterns


def blocks(t: Tensor, n: int, c: int) -> Tensor:
    """The repeats of the pattern of channel c in sample n."""
    return t[n, c].unflatten(0, (REPEATS, 8))


def assert_repeats(t: Tensor, right: Tensor) -> None:
    """Each repeat of channel c is right[c] in its dtype, but for one rounding."""
    rounded = right.to(bf16)
    # A unit of bfloat16 is 0.0078 of the value, and float32 adds its own roundings.
    least = 0.01 * right.abs() + 1e-5 * right.abs().max()
    for c in range(C):
        first = blocks(t, 0, c)[0].flatten()
        assert ((first.double() - rounded[c].double()).abs() <= least[c]).all()
        for n in range(N):
            assert (blocks(t, n, c) == first.view(1, 8, -1)).all()


@pytest.mark.big
@pytest.mark.skipif(os.environ.get("BNORM_EXT_BIG") != "1", reason="BNORM_EXT_BIG is not 1")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_more_than_2_31_elements(layout, training):
    x, patterns = patterned(0, layout)
    x.requires_grad_()
    weight = torch.arange(1.0, C + 1, requires_grad=True)
    bias = torch.zeros(C, requires_grad=True)
    mean, var = torch.zeros(C), torch.ones(C)
    y = bnorm_ext.batch_norm(x, mean, var, weight, bias, training)

    values = patterns.double()
    own = values.mean(1), values.var(1, correction=0)
    used = own if training else (torch.zeros(C, dtype=f64), torch.ones(C, dtype=f64))
    rstd = (used[1] + 1e-5).rsqrt()[:, None]
    xhat, w = (values - used[0][:, None]) * rstd, weight.detach().double()[:, None]
    assert_repeats(y.detach(), xhat * w)
    if training:
        torch.testing.assert_close(mean.double(), own[0] * 0.1)
        torch.testing.assert_close(var.double(), 0.9 + own[1] * 0.1)

    dy, given = patterned(1, layout)
    y.backward(dy)
    del y, dy
    g = given.double()
    sums = g.sum(1), (g * xhat).sum(1)
    dx = g
    if training:
        dx = g - (sums[0][:, None] + xhat * sums[1][:, None]) / ROWS
    assert x.grad is not None
    assert_repeats(x.grad, dx * w * rstd)
    # The roundings of a pattern's sums repeat as often as it does.
    for parameter, s in ((bias, sums[0]), (weight, sums[1])):
        torch.testing.assert_close(parameter.grad.double(), s * (N * REPEATS), rtol=1e-5, atol=0)
