"""Activation and residual in the CUDA kernels, run by the emulator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bnorm_ext.activations import compose
from tests.common import emulated
from tests.common.cases import DTYPES, Case, unit_roundoff
from tests.common.emulated import Epilogue
from tests.common.emulated_cases import (
    FUSED,
    LAYOUTS,
    SLOPE,
    STEEPEST,
    assert_right,
    fused,
    same_bits,
    without_kinks,
)

CASES = [
    pytest.param((4, 8, 4, 8), "contiguous", id="vectors"),
    pytest.param((4, 16, 4, 8), "channels_last", id="vectors of channels"),
    pytest.param((3, 5, 7, 3), "contiguous", id="odd"),
    pytest.param((3, 5, 7, 3), "channels_last", id="odd, channels last"),
    pytest.param((8, 2, 32, 48), "contiguous", id="many blocks per channel"),
    pytest.param((2, 3, 40, 40), "channels_last", id="few channels"),
    pytest.param((2, 300, 2, 2), "channels_last", id="many channels"),
    pytest.param((16, 40), "contiguous", id="1-D"),
    pytest.param((4, 8, 7, 7), "contiguous", id="groups of channels"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("act", "add"), FUSED)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_results(
    shape: tuple[int, ...], layout: str, act: str, add: bool, dtype: torch.dtype
) -> None:
    """Training and inference against float64; the same bits for another order of threads."""
    for training in (True, False):
        c, e = fused(shape, dtype, layout, act, add, training=training)
        c = without_kinks(c, e)
        ours = emulated.run(c, e)
        assert_right(c, e, ours)
    assert same_bits(emulated.run(c, e, seed=1), ours)


def special(dtype: torch.dtype) -> Tensor:
    """Every kink and its neighbours, zeros, infinities, NaN and large values."""
    inf, near = torch.tensor(math.inf, dtype=dtype), torch.tensor([0, 6, 3, -3], dtype=dtype)
    values = [near, torch.nextafter(near, inf), torch.nextafter(near, -inf), -near]
    values += [torch.tensor([-0.0, math.inf, -math.inf, math.nan, 100, -100, 1, -1], dtype=dtype)]
    return torch.cat(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "add"), FUSED)
def test_special_values(act: str, add: bool, layout: str, dtype: torch.dtype) -> None:
    """z is exactly x, or x + residual: at the kinks, infinite, NaN; dy infinite or NaN too. Value
    for value what torch's operators give, but that the gradients of silu and hardswish at NaN are
    NaN: torch's hardswish has NaN or dy there, by the place in the tensor."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = special(dtype)
    sent = torch.tensor([1, -2, math.inf, math.nan, 0, 1.5, 2, 3], dtype=dtype)
    z = values.repeat_interleave(8).view(1, 8, 6, 4).expand(2, -1, -1, -1)
    memory_format = getattr(torch, layout, torch.contiguous_format)
    x = z.contiguous(memory_format=memory_format)
    dy = sent.repeat(24).view(1, 8, 6, 4).expand_as(x).contiguous(memory_format=memory_format)
    residual = None
    if add:
        # x + residual is exact: one of them is 0, or both are half.
        which = torch.arange(x.numel()).view(x.shape) % 3
        is_half = (which == 2) & (x / 2 * 2 == x)
        residual = torch.where(is_half, x / 2, torch.where(which == 1, x, 0))
        residual = residual.contiguous(memory_format=memory_format)
        x = torch.where(is_half, x / 2, torch.where(which == 1, 0, x))
        x = x.contiguous(memory_format=memory_format)
    # (x - 0) * 1 * 1 + 0
    c = Case(x, dy, torch.zeros(8), torch.ones(8), training=False, eps=0)
    if dtype == torch.float64:
        c = c.but(running_mean=torch.zeros(8).double(), running_var=torch.ones(8).double())
    # exp of torch's silu overflows where ours does not: silu and hardswish beside float64.
    exact = torch.float64 if act in STEEPEST else wide
    sum_of = x.to(exact) if residual is None else x.to(exact) + residual.to(exact)
    leaf = sum_of.requires_grad_()
    right = compose(leaf, None, act, SLOPE)
    sent = torch.ones_like(leaf) if act == "silu" else dy.to(exact)
    (g,) = torch.autograd.grad(right, leaf, sent)
    if act in STEEPEST:
        g = torch.where(leaf.isnan(), math.nan, g).to(wide)
    if act == "silu":
        g = g * dy.to(wide)
    tolerance = {"rtol": 0, "atol": 0}
    if act in STEEPEST:
        u = unit_roundoff(wide) * 16 + (2 * unit_roundoff(dtype) if wide != dtype else 0)
        # Near -3 and 0 factors cancel: relative to the terms of the sum.
        tolerance = {"rtol": u, "atol": 6 * u}
    for masked in (True, False):
        ours = emulated.run(c, Epilogue(act, SLOPE, residual, masked))
        for name, t in {"y": right.detach(), "dresidual": g, "dx": g}.items():
            torch.testing.assert_close(
                ours[name], t.to(dtype), equal_nan=True, **tolerance, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "add"), [("relu", True), ("leaky_relu", False), ("relu", False)])
def test_sums_beyond_float(layout: str, act: str, add: bool) -> None:
    """Sums of g that exceed float's range in between although the result fits; those of dy do not
    fit."""
    x = torch.where(torch.arange(2 * 8 * 48).view(2, 8, 6, 8) % 3 == 0, -1.0, 1.0).repeat(
        2, 1, 1, 1
    )
    dy = torch.full_like(x, 3e38)
    dy[2:] = torch.where(x[2:] > 0, -3e38, 3e38)
    memory_format = getattr(torch, layout, torch.contiguous_format)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    c = Case(x, dy, torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8), training=False)
    residual = torch.zeros_like(x) if add else None
    slope = 1e-3
    for masked in (True, False):
        ours = emulated.run(c, Epilogue(act, slope, residual, masked))
        g = torch.where(x > 0, dy.double(), dy.double() * (slope if act == "leaky_relu" else 0))
        xhat = x.double() / math.sqrt(1 + c.eps)
        for name, right in {"dbias": g, "dweight": g * xhat}.items():
            size = right.abs().sum((0, 2, 3))
            assert ((ours[name].double() - right.sum((0, 2, 3))).abs() < 1e-6 * size).all(), name


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_absent_parameters(layout: str, act: str, absent: tuple[str, ...]) -> None:
    c, e = fused((4, 8, 4, 8), torch.float32, layout, act, False, **dict.fromkeys(absent))
    c = without_kinks(c, e)
    assert_right(c, e, emulated.run(c, e))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["relu6", "silu"])
def test_16_bit_parameters(act: str, dtype: torch.dtype, training: bool) -> None:
    c, e = fused((4, 8, 4, 8), dtype, "contiguous", act, True, parameters=dtype, training=training)
    c = without_kinks(c, e)
    assert_right(c, e, emulated.run(c, e))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("act", "add"), [("identity", True), ("relu", True), ("silu", False)])
def test_gradients_that_are_asked_for(act: str, add: bool, training: bool, layout: str) -> None:
    """Each combination of the four: the same bits as all of them, the others undefined."""
    c, e = fused((8, 2, 32, 48), torch.float32, layout, act, add, training=training)
    whole = emulated.run(c, e)
    names = ("dx", "dresidual", "dweight", "dbias")
    for wanted in itertools.product([True, False], repeat=4):
        with emulated.session() as s:
            x, dy, residual = s.copy(c.x), s.copy(c.dy), s.copy(e.residual)
            parameters = (s.copy(c.weight), s.copy(c.bias))
            known = (s.copy(c.running_mean), s.copy(c.running_var), None, None)
            if training:
                _, *batch, _ = s.call(
                    *("batch_norm_training", x, None, None, None, None, None, None, 0.1, c.eps)
                )
                known = (None, None, *batch)
            gradients = s.call(
                *("batch_norm_backward", dy, x, residual, *parameters, *known, training, c.eps),
                *(None, e.act, e.slope, wanted),
            )
            found = [t if t is None else t.clone() for t in gradients]
        for name, was_wanted, t in zip(names, wanted, found, strict=True):
            assert (t is not None) == was_wanted
            assert t is None or torch.equal(t, whole[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("act", "add"), [("leaky_relu", True), ("hardswish", False)])
def test_pieces_of_synchronised_training(
    act: str, add: bool, dtype: torch.dtype, layout: str
) -> None:
    """Statistics known, then apply and the two halves of backward: as one call, to the bit."""
    c, e = fused((8, 5, 6, 8), dtype, layout, act, add)
    whole = emulated.run(c, e)
    n = c.x.numel() // 5
    with emulated.session() as s:
        x, dy, residual = s.copy(c.x), s.copy(c.dy), s.copy(e.residual)
        parameters = (s.copy(c.weight), s.copy(c.bias))
        _, mean, rstd, _ = s.call(
            *("batch_norm_training", x, None, None, None, None, None, None, 0.1, c.eps)
        )
        how = (e.act, e.slope)
        y, mask = s.call("batch_norm_apply", x, residual, *parameters, mean, rstd, *how, True)
        for given in [(residual, None), (None, mask)][: 1 + add]:
            known = (dy, x, given[0], *parameters, mean, rstd, given[1])
            sums = s.call("batch_norm_backward_reduce", *known, *how)
            means = [(t.double() / n).to(t.dtype) for t in sums]
            dx, dresidual = s.call("batch_norm_backward_apply", *known, *means, *how)
            assert torch.equal(y, whole["y"])
            assert torch.equal(sums[0], whole["dbias"])
            assert torch.equal(sums[1], whole["dweight"])
            assert torch.equal(dx, whole["dx"])
            # It comes where a residual is given.
            assert (dresidual is None) == (not add)  # also where the mask stands for the residual
            assert dresidual is None or torch.equal(dresidual, whole["dresidual"])


def test_empty_input() -> None:
    with emulated.session() as s:
        x, ones = torch.empty(0, 3, 4), torch.ones(3)
        y, mean, rstd, mask = s.call(
            *("batch_norm_training", x, x, ones, ones, None, None, None, 0.1, 1e-5),
            *("relu", 0.01, True),
        )
        assert y.shape == x.shape
        assert mask.numel() == 0
        gradients = s.call(
            *("batch_norm_backward", x, x, None, ones, ones, None, None, mean, rstd, True, 1e-5),
            *(mask, "relu", 0.01, [True] * 4),
        )
        assert [t.shape for t in gradients] == [x.shape, x.shape, ones.shape, ones.shape]
        assert not any(t.any() for t in gradients)


def test_residual_that_is_not_aligned() -> None:
    """It alone: the vector path must look at all of them."""
    for shape in ((4, 8, 4, 8), (4, 8, 7, 7)):
        c, e = fused(shape, torch.float32, "contiguous", "silu", True)
        storage = torch.empty(c.x.numel() + 1)
        e.residual = storage[1:].view(c.x.shape).copy_(e.residual)
        assert_right(c, e, emulated.run(c, e))


def test_residual_in_another_layout() -> None:
    c, e = fused((4, 8, 4, 8), torch.float32, "channels_last", "silu", True, training=False)
    right = emulated.run(c, e)
    with emulated.session() as s:
        x, dy, residual = s.copy(c.x), s.copy(c.dy), s.copy(e.residual.contiguous())
        rest = [s.copy(t) for t in (c.weight, c.bias, c.running_mean, c.running_var)]
        y, _ = s.call("batch_norm_inference", x, residual, *rest, c.eps, e.act, e.slope)
        gradients = s.call(
            *("batch_norm_backward", dy, x, residual, *rest, None, None, False, c.eps, None),
            *(e.act, e.slope, [True] * 4),
        )
        for name, t in zip(
            ("y", "dx", "dresidual", "dweight", "dbias"), (y, *gradients), strict=True
        ):
            assert torch.equal(t, right[name]), name
            assert t.dim() == 1 or t.is_contiguous(memory_format=torch.channels_last)
