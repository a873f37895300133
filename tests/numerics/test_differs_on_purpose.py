"""Rows of the README's table of deliberate differences: native's figure beside ours. A row whose
test finds native right has to go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnorm_ext
from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference
from tests.common.cases import BOTH, FORMATS, generator, normal, threads
from tests.common.twins import outcome

f16, f32, f64 = torch.float16, torch.float32, torch.float64


def plain(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    var = centred.square().mean((0, 2, 3), keepdim=True)
    return centred / (var + 1e-5).sqrt() * weight[:, None, None]


def third_derivative(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of y, three times in x, each time along another direction."""
    x = normal((4, 3, 2, 2), 0).requires_grad_()
    result = function(x, normal((3,), 1))
    for seed in (2, 3, 4):
        total = (result * normal((4, 3, 2, 2), seed)).sum()
        (result,) = torch.autograd.grad(total, x, create_graph=True)
    return result.detach()


def test_third_derivatives_in_training():
    """Native's is off by as much as its size (torch 2.13), or refused (2.14)."""
    right = third_derivative(plain)

    def off(function: Callable[..., Tensor]) -> float:
        got = third_derivative(lambda x, weight: function(x, None, None, weight, training=True))
        return ((got - right).abs().max() / right.abs().max()).item()

    # Three times a few hundred roundings of float64.
    assert off(bnorm_ext.batch_norm) < 1e-13
    figures: list[float] = []
    refused = outcome(lambda: figures.append(off(F.batch_norm)))
    if refused is None:
        assert figures[0] > 0.1
    else:
        assert "does not support 3rd+ order derivatives" in refused[1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_input_of_1e19(layout):
    """The sum of squares leaves float32, the variance does not: native's is inf, its y 0."""
    x = (normal((8, 3, 4, 4), 0) * 1e19).float().contiguous(memory_format=FORMATS[layout])
    right = batch_norm_reference(x, torch.zeros(3), torch.ones(3), None, None, True, 0.1, 1e-5)
    for name, function in BOTH.items():
        mean, var = torch.zeros(3), torch.ones(3)
        y = function(x, mean, var, training=True)
        if name == "native":
            assert var.isinf().all()
            assert (y == 0).all()
        else:
            # A few roundings of float32.
            torch.testing.assert_close(var.double(), right.running_var, rtol=1e-6, atol=0)
            torch.testing.assert_close(y.double(), right.y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "native_off"), [(f16, 0.05), (torch.bfloat16, 0.3)], ids=str)
def test_weight_gradient_where_everything_is_16_bit(dtype, native_off, layout):
    """Native keeps the mean in 16 bit; what it is off by, times the sum of dy, is added to dweight:
    11% in float16, 51% in bfloat16 for means of two standard deviations."""
    shape = (32, 16, 56, 56)
    options = {"generator": generator(0)}
    x, dy = (
        (torch.randn(shape, **options) + mean).to(dtype).contiguous(memory_format=FORMATS[layout])
        for mean in (2, 1)
    )
    weight = torch.ones(16, dtype=dtype)
    right = batch_norm_backward_reference(dy, x, None, None, weight, True, 1e-5).dweight
    for name, function in BOTH.items():
        leaf = weight.clone().requires_grad_()
        y = function(x, None, None, leaf, torch.zeros_like(leaf), training=True)
        (dweight,) = torch.autograd.grad(y, leaf, dy)
        off = (dweight.double() - right).abs().max() / right.abs().max()
        # Ours is rounded to 16 bit, no more.
        assert off > native_off if name == "native" else off < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [f64, f32, f16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("count", [1, 2])
def test_transposed_matrix_as_an_image(count, training, dtype):
    """A (W, C) matrix as (1, C, 1, W): channels lie innermost, while the strides of the dimensions
    of one element are not those of channels_last. With a contiguous dy native's dx belongs
    elsewhere: it is off by the size of its values."""
    C, W = 5, 7
    x = normal((W, C), 0).to(dtype).t()[None, :, None, :]
    assert (x.shape, x.stride()) == ((1, C, 1, W), (C, 1, C * W, C))
    dy = normal((1, C, 1, W), 1).to(dtype)
    statistics = torch.zeros(C), torch.ones(C)
    right = batch_norm_backward_reference(dy, x, *statistics, None, training, 1e-5).dx
    kind = dtype if dtype == f64 else f32
    for name, function in BOTH.items():
        leaf = x.detach().requires_grad_()
        with threads(count):
            y = function(leaf, *(t.to(kind) for t in statistics), training=training)
            (dx,) = torch.autograd.grad(y, leaf, dy)
        off = (dx.double() - right).abs().max()
        # Values up to 3 in the dtype's precision.
        assert off > 1 if name == "native" else off < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("name", "training"), [("weight", True), ("weight", False), ("running_var", False)]
)
@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 3, 3)], ids=str)
def test_strided_parameters_with_channels_last(shape, name, training):
    """Native's backward takes their values as if they lay side by side."""
    x, dy = normal(shape, 0), normal(shape, 1)
    if x.dim() == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    values = normal((6,), 2).abs() + 0.5
    strided = torch.stack([values, torch.ones(6, dtype=f64)], -1)[:, 0]

    def gradient(function: Callable[..., Tensor], given: Tensor) -> Tensor:
        vectors = {"running_mean": torch.zeros(6, dtype=f64), "running_var": values.clone()}
        y = function(x, **{**vectors, name: given}, training=training)
        return torch.autograd.grad(y, x, dy)[0]

    right = gradient(F.batch_norm, values)
    off = {
        who: ((gradient(function, strided) - right).abs().max() / right.abs().max()).item()
        for who, function in BOTH.items()
    }
    assert off["ours"] < 1e-13
    assert not off["native"] < 0.1  # nan where it reads memory that nothing was written to


@pytest.mark.parametrize("how", ["copy_", "zero_", "reset_running_stats"])
def test_statistics_written_between_forward_and_backward(how):
    """Native saves running statistics for backward, although training never needs them. In
    inference both need them, and both refuse."""
    for cls in (nn.BatchNorm2d, bnorm_ext.BatchNorm2d):
        for training in (True, False):
            module = cls(3, dtype=f64).train(training)
            x = normal((4, 3, 5, 5), 0).requires_grad_()
            y = module(x)
            with torch.no_grad():
                if how == "reset_running_stats":
                    module.reset_running_stats()
                elif how == "zero_":
                    module.running_mean.zero_()
                else:
                    module.running_var.copy_(torch.ones(3))
            if training and cls is bnorm_ext.BatchNorm2d:
                (dx,) = torch.autograd.grad(y.square().sum(), x)
                right = torch.autograd.grad(
                    F.batch_norm(x, None, None, training=True).square().sum(), x
                )[0]
                # float64; values below 10
                torch.testing.assert_close(dx, right, rtol=0, atol=1e-11)
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(y.square().sum(), x)


def moved_by_training(cls, keep):
    """Gradient of what ``keep`` makes of a module and x, after a pass in training has moved the
    statistics."""
    module = cls(3, dtype=f64)
    x = normal((4, 3, 5, 5), 0, 2, 1).requires_grad_()
    total = keep(module, x)
    module.train()(x.detach() * 3)
    return torch.autograd.grad(total, x)[0]


def in_evaluation(module, x):
    return module.eval()(x).square().sum()


def by_an_operation(module, x):
    return (module.running_var * x.mean((0, 2, 3))).sum()


@pytest.mark.parametrize("keep", [in_evaluation, by_an_operation])
def test_training_moves_statistics_that_are_kept_for_backward(keep):
    """Native does not tell autograd that it has changed them, so that backward reads the new ones.
    Here autograd notices."""
    dx = moved_by_training(nn.BatchNorm2d, keep)
    x = normal((4, 3, 5, 5), 0, 2, 1).requires_grad_()
    (right,) = torch.autograd.grad(keep(nn.BatchNorm2d(3, dtype=f64), x), x)
    assert (dx - right).abs().max() > 0.1 * right.abs().max()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        moved_by_training(bnorm_ext.BatchNorm2d, keep)


def test_cumulative_average_of_a_counter_of_minus_one():
    x = normal((4, 3, 2, 2), 0).float()
    native, ours = (cls(3, momentum=None) for cls in (nn.BatchNorm2d, bnorm_ext.BatchNorm2d))
    for module in (native, ours):
        module.num_batches_tracked.fill_(-1)
    with pytest.raises(ZeroDivisionError):
        native(x)
    y = ours(x)
    assert torch.isfinite(y).all()
    assert ours.running_mean.isnan().all()
    assert ours.num_batches_tracked == 0
