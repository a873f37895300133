"""First, second and third derivatives of the C++ autograd Functions against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bnorm_ext

SHAPES = [(4, 3), (3, 2, 5), (2, 3, 2, 3), (2, 2, 2, 1, 3)]
DOUBLE = {"dtype": torch.float64}


def arguments(shape, device="cpu"):
    C = shape[1]
    options = {**DOUBLE, "device": device}
    x, weight, bias = (
        torch.randn(size, **options).requires_grad_() for size in (shape, (C,), (C,))
    )
    running = torch.randn(C, **options), torch.rand(C, **options) + 0.5
    return x, weight, bias, running


def function(running, training):
    def f(x, weight=None, bias=None):
        mean, var = (t.clone() for t in running)
        return bnorm_ext.batch_norm(x, mean, var, weight, bias, training)

    return f


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape, training, device):
    x, weight, bias, running = arguments(shape, device)
    f = function(running, training)
    for given in ((x,), (x, weight), (x, weight, bias)):
        assert gradcheck(f, given)
        assert gradgradcheck(f, given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_forward_mode_and_batched(shape, training):
    """Through the Python Function that serves forward mode and vmap."""
    x, weight, bias, running = arguments(shape)
    f = function(running, training)
    every = {"check_batched_grad": True, "check_undefined_grad": True}
    assert gradcheck(
        f, (x, weight, bias), check_forward_ad=True, check_batched_forward_grad=True, **every
    )
    assert gradgradcheck(f, (x, weight, bias), check_fwd_over_rev=True, **every)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradgradcheck_in_both_layouts(memory_format):
    x, weight, bias, running = arguments((3, 2, 2, 2))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert gradgradcheck(function(running, True), (x, weight, bias))


def test_third_derivative():
    x, weight, _, _ = arguments((3, 2, 2))

    def first(x, weight):
        y = bnorm_ext.batch_norm(x, None, None, weight, None, True)
        return torch.autograd.grad((y**3).sum(), (x, weight), create_graph=True)

    assert gradgradcheck(first, (x, weight))


def test_double_backward_of_one_gradient_alone():
    """Each of dx, dweight and dbias differentiated with the others unused."""
    x, weight, bias, running = arguments((3, 2, 4))
    for i in range(3):
        for training in (True, False):

            def one(x, weight, bias, i=i, training=training):
                y = function(running, training)(x, weight, bias)
                inputs = (x, weight, bias)
                return torch.autograd.grad((y**3).sum(), inputs[i], create_graph=True)

            assert gradcheck(one, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_double_backward_keeps_dtypes(dtype):
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    y = bnorm_ext.batch_norm(x, None, None, weight, bias, True)
    gradients = torch.autograd.grad(y.float().pow(3).sum(), (x, weight, bias), create_graph=True)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    second = torch.autograd.grad(gradients[0].float().pow(2).sum(), (x, weight))
    assert [g.dtype for g in second] == [dtype, torch.float32]


def test_gradients_flow_through_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, weight, bias, _ = arguments((3, 2, 4))

    def f(x):
        return bnorm_ext.batch_norm(x, None, None, weight, bias, True)

    expected = torch.autograd.grad((f(x) ** 2).sum(), (x, weight, bias))
    actual = torch.autograd.grad(
        (checkpoint(f, x, use_reentrant=False) ** 2).sum(), (x, weight, bias)
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
