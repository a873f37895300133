"""The mask that the CUDA kernels leave for backward, run by the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bnorm_ext.bench import promise
from tests.common import emulated
from tests.common.cases import DTYPES
from tests.common.emulated_cases import (
    LAYOUTS,
    PIECEWISE,
    SHAPES_AND_LAYOUTS,
    fused,
    known,
    same_bits,
)


def packed(is_open: Tensor, x: Tensor) -> Tensor:
    """The bytes of the mask for x, from one bool per element."""
    rows, row_bytes = emulated.mask_shape(x)
    if emulated.group_of(x):
        of_vectors = is_open.reshape(rows, -1).to(torch.int64)
        return (of_vectors << torch.arange(of_vectors.shape[1])).sum(1).to(torch.uint8)
    by_channel = is_open.transpose(0, 1).reshape(x.shape[1], -1)  # [C, N * S]
    bits = by_channel.reshape(1, -1) if x.shape[1] == 1 else by_channel
    if rows != bits.shape[0]:
        bits = by_channel.t()
    padded = torch.zeros(rows, row_bytes * 8, dtype=torch.int64)
    padded[:, : bits.shape[1]] = bits
    return (padded.view(rows, row_bytes, 8) << torch.arange(8)).sum(2).to(torch.uint8).flatten()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "layout"), SHAPES_AND_LAYOUTS)
def test_mask(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Where its bits are; every gradient through it has the bits of that through the residual."""
    c, e = fused(shape, dtype, layout, "relu", True)
    through_mask = emulated.run(c, e, seed=2)
    mask = through_mask.pop("mask")
    # y > 0 wherever z > 0 but for what rounding to 16 bit makes 0; there is none here.
    assert torch.equal(mask, packed(through_mask["y"] > 0, c.x))
    e.masked = False
    assert same_bits(emulated.run(c, e), through_mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", PIECEWISE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_of_each_activation(layout: str, act: str, training: bool) -> None:
    for shape in ((4, 24, 6, 4), (4, 24, 3, 5)):
        c, e = fused(shape, torch.float32, layout, act, True, training=training)
        through_mask = emulated.run(c, e)
        z = promise.pre_activation(c, known(e))
        is_open = (z > 0) & (z < 6) if act == "relu6" else z > 0
        assert torch.equal(through_mask.pop("mask"), packed(is_open, c.x))
        e.masked = False
        assert same_bits(emulated.run(c, e), through_mask)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 8, 12, 24), "contiguous"),
        ((4, 8, 12, 24), "channels_last"),
        pytest.param((4, 8, 5, 7), "contiguous", id="groups"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mask_for_another_alignment(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    """Written by a call whose tensors start at multiples of 16 bytes and read by one whose do not,
    and the other way round."""
    c, e = fused(shape, dtype, layout, "relu", True, training=False)

    def shifted(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=dtype)
        moved = storage.as_strided(t.shape, t.stride(), 1).copy_(t)
        assert moved.data_ptr() % 16 != 0
        return moved

    found = []
    for moves in itertools.product([lambda t: t, shifted], repeat=3):
        with emulated.session() as s:
            rest = [s.copy(t) for t in (c.weight, c.bias, c.running_mean, c.running_var)]
            y, mask = s.call(
                *("batch_norm_inference", s.copy(moves[0](c.x)), s.copy(moves[2](e.residual))),
                *rest,
                *(c.eps, e.act, e.slope, True),
            )
            gradients = s.call(
                *("batch_norm_backward", s.copy(moves[1](c.dy)), s.copy(c.x), None, *rest),
                *(None, None, False, c.eps, mask, e.act, e.slope, [True, True, False, False]),
            )
            found.append([t.clone() for t in (y, mask, *gradients[:2])])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), SHAPES_AND_LAYOUTS)
def test_length_that_compilers_are_told(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    """Without a tensor: what the operator's fake for CUDA says is what the kernels leave."""
    c, e = fused(shape, dtype, layout, "relu", True)
    with emulated.session() as s:
        x, residual, running = s.copy(c.x), s.copy(e.residual), s.copy(c.running_var)
        arguments = (None, None, running, running, c.eps, e.act, e.slope, True)
        _, mask = s.call("batch_norm_inference", x, residual, *arguments)
        length = mask.numel()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty_strided(c.x.shape, c.x.stride(), dtype=dtype, device="cuda")
        running = torch.empty(shape[1], device="cuda")
        _, fake = torch.ops.bnorm_ext.batch_norm_inference(
            x, x, None, None, running, running, c.eps, e.act, e.slope, True
        )
    assert fake.shape == (length,)
