"""The fakes (bnorm_ext/_ops.py) against the operators: shape, dtype and strides of every output of
random calls. Above all the length of the mask, which the fakes compute for themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bnorm_ext  # noqa: F401  (registers the operators)
from tests.common import emulated
from tests.common.cases import DTYPES

Run = Callable[..., tuple[Tensor | None, ...]]
#: Positions of a channel: around the lengths at which the CPU's mask has rows of its own, and where
#: CUDA kernels take whole vectors, groups of channels, or neither.
POSITIONS = st.one_of(st.integers(0, 40), st.sampled_from([49, 127, 128, 196, 255, 256, 257, 1025]))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    """Sizes of x and dy, and the strides of each."""
    rank = draw(st.integers(2, 5))
    sizes = [draw(st.integers(0, 7)), draw(st.integers(1, 40))]
    if rank > 2:
        sizes.append(draw(POSITIONS))
    while len(sizes) < rank:  # the last size in two factors
        last = sizes.pop()
        factor = draw(st.sampled_from([d for d in range(1, last + 1) if last % d == 0] or [0]))
        sizes += [last // factor if factor else 0, factor]
    assume(math.prod(sizes) != sizes[1])  # native refuses one value per channel
    return tuple(sizes), [draw_strides(draw, sizes) for _ in range(2)]


def draw_strides(draw: st.DrawFn, sizes: list[int]) -> list[int]:
    rank = len(sizes)
    # Contiguous, channels_last, or any order of the dimensions.
    usual = st.sampled_from([tuple(range(rank)), (0, *range(2, rank), 1)])
    order = draw(st.one_of(usual, usual, st.permutations(range(rank))))
    strides, step = [0] * rank, draw(st.sampled_from([1, 1, 1, 2]))
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, sizes[dim])
    return strides


def outputs(run: Run, x: Tensor, dy: Tensor, act: str, add: bool) -> Iterator[Tensor | None]:
    """Of all operators for these tensors."""
    C = x.shape[1]
    residual, acc = x if add else None, torch.promote_types(x.dtype, torch.float32)
    weight, bias = x.new_ones(C), x.new_zeros(C)
    mean, rstd, running_mean, running_var = (x.new_ones(C, dtype=acc) for _ in range(4))
    if acc != x.dtype:
        weight, bias = weight.to(acc), bias.to(acc)
    forward = (x, residual, weight, bias)
    buffers, how = (running_mean, running_var), (act, 0.01)
    trained = run("batch_norm_training", *forward, *buffers, None, 0.1, 1e-5, *how, True)
    mask = trained[3]
    yield from trained
    yield from run("batch_norm_inference", *forward, *buffers, 1e-5, *how, True)
    yield from run("batch_norm_apply", *forward, mean, rstd, *how, True)
    yield from run("batch_norm_stats", x)
    known, wanted = (dy, x, residual, weight, None), [True] * 4
    for any_layout in (False, True):
        tail = (1e-5, None, *how, wanted, any_layout)
        yield from run("batch_norm_backward", *known, None, None, mean, rstd, True, *tail)
        yield from run("batch_norm_backward", *known, *buffers, None, None, False, *tail)
        tail = (1e-5, mask, *how, wanted, any_layout)
        yield from run("batch_norm_backward", *known, *buffers, None, None, False, *tail)
    yield from run("batch_norm_backward_reduce", *known, mean, rstd, None, *how)
    yield from run("batch_norm_backward_apply", *known, mean, rstd, None, mean, rstd, *how)
    known = (dy, x, None, weight, None, mean, rstd, mask)
    yield from run("batch_norm_backward_apply", *known, mean, rstd, *how)


def described(t: Tensor | None) -> Any:
    if t is None:
        return None
    # Strides of an empty tensor mean nothing: at::empty_like itself differs between the two.
    return tuple(t.shape), t.stride() if t.numel() else (), t.dtype


def installed(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.bnorm_ext, name)(*arguments)


def check(run: Run, device: str, layout: Any, dtype: torch.dtype, act: str, add: bool) -> None:
    sizes, strides = layout

    def made(where: str) -> list[Tensor]:
        return [torch.empty_strided(sizes, s, dtype=dtype, device=where) for s in strides]

    real = [described(t) for t in outputs(run, *(t.fill_(1) for t in made("cpu")), act, add)]
    with FakeTensorMode():
        fake = [described(t) for t in outputs(installed, *made(device), act, add)]
    assert fake == real


CALLS = (
    layouts(),
    st.sampled_from(DTYPES),
    st.sampled_from(["identity", "relu", "leaky_relu", "silu"]),
    st.booleans(),
)


@pytest.mark.parametrize("S", [42, 43, 127, 128, 129, 255, 256, 257, 258])
def test_masks_where_their_rows_change(S):
    """42 and 43 positions of 3 channels are a sample of about 128 values."""
    check(installed, "cpu", ((2, 3, S), [[3 * S, S, 1]] * 2), torch.float32, "relu", True)


def test_a_mask_ties_gradients_to_the_format_of_x():
    contiguous, channels_last = [60, 20, 5, 1], [60, 1, 15, 3]
    for strides in ([contiguous, channels_last], [channels_last, contiguous]):
        check(installed, "cpu", ((2, 3, 4, 5), strides), torch.float32, "relu", True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*CALLS)
def test_on_the_cpu(layout, dtype, act, add):
    check(installed, "cpu", layout, dtype, act, add)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*CALLS)
def test_on_cuda(layout, dtype, act, add):
    """In the emulator; the fakes need no GPU."""
    with emulated.session() as s:
        check(s.call, "cuda", layout, dtype, act, add)
