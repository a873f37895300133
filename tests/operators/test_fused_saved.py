"""Residual and activation: what forward keeps for backward, and which gradients there are."""

from __future__ import annotations

import itertools

import pytest
import torch

import bnorm_ext
from tests.common.fused_cases import make, ours, run


def saved_bytes(call):
    """Bytes of tensors that autograd keeps, by their storage."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(storages.values()), y


@pytest.mark.parametrize(
    ("act", "with_residual", "tensors"),
    [("relu", False, 1), ("silu", False, 1), ("relu6", True, 1 + 1 / 32), ("silu", True, 2)],
)
def test_what_is_kept_for_backward(act, with_residual, tensors):
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    layer = bnorm_ext.BatchNormAct2d(16, act=act)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    kept, _ = saved_bytes(lambda: layer(x, residual))
    assert tensors * x.nbytes <= kept < tensors * x.nbytes + 2048


def test_no_mask_where_nobody_needs_it():
    x, r = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    buffers = (torch.zeros(3), torch.ones(3))

    def mask(x, act="relu"):
        return torch.ops.bnorm_ext.batch_norm_inference(x, r, None, None, *buffers, 1e-5, act)[1]

    assert mask(x).numel() == 0
    assert mask(x.clone().requires_grad_()).numel() > 0
    assert mask(x.clone().requires_grad_(), "silu").numel() == 0
    with torch.no_grad():
        assert mask(x.clone().requires_grad_()).numel() == 0


def test_residual_alone_takes_the_gradient_as_it_is():
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    r = torch.randn(4, 3, 8, 8, requires_grad=True)
    y = bnorm_ext.batch_norm(x, None, None, training=True, residual=r)
    dy = torch.randn_like(y)
    dx, dr = torch.autograd.grad(y, (x, r), dy)
    assert torch.equal(dr, dy)
    (plain,) = torch.autograd.grad(bnorm_ext.batch_norm(x, None, None, training=True), x, dy)
    assert torch.equal(dx, plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_gradients_of_some_inputs_only(act, training):
    f = make((4, 6, 5, 7), torch.float64, "contiguous", act, True, training)
    c, every = f.c, run(ours, f)
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [c.x, f.residual, c.weight, c.bias]
        leaves = [t.detach().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True)]
        x, r, weight, bias = leaves
        running = [t.clone() for t in (c.running_mean, c.running_var)]
        y = ours(x, *running, weight, bias, training, 0.1, c.eps, residual=r, act=act)
        y.backward(c.dy)
        for t, name in zip(leaves, ("dx", "dresidual", "dweight", "dbias"), strict=True):
            assert (t.grad is not None) == t.requires_grad
            if t.requires_grad:
                assert torch.equal(t.grad, every[name])
