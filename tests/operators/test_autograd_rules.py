"""Which gradients there are, empty batches, grad modes, version counters, and what in-place changes
between forward and backward do: as native."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnorm_ext
from tests.common.cases import BOTH, Case, case, normal, run
from tests.common.twins import outcome

SHAPE = (4, 5, 3, 2)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def make(training: bool, shape: tuple[int, ...] = SHAPE) -> Case:
    return case(normal(shape, 0, 1), torch.float64, training=training)


def call(function, c: Case, **changes: Tensor | None) -> Tensor:
    given = {"input": c.x, "weight": c.weight, "bias": c.bias} | changes
    return function(
        given["input"], c.running_mean, c.running_var, given["weight"], given["bias"], c.training
    )


# ---- Empty batches ------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "shape", [(0, 5), (0, 5, 3, 2), (4, 5, 0), (4, 5, 3, 0), (0, 5, 0, 0), (4, 0), (0, 0)],
    ids=str,
)  # fmt: skip
def test_empty_input(shape, training):
    C = shape[1]
    given = {} if C else {"weight": None, "bias": None}
    c = case(torch.empty(shape), torch.float32, training=training, **given)
    ours, native = (run(f, c) for f in BOTH.values())
    for key, t in native.items():
        assert ours[key].shape == t.shape, key
        assert ours[key].dtype == t.dtype, key
        assert torch.equal(ours[key], t), key


@MODES
def test_empty_channels_last_keeps_its_strides(training):
    x = torch.empty(0, 5, 3, 2).to(memory_format=torch.channels_last)
    c = case(normal(SHAPE, 0)).but(training=training)
    ours, native = (call(f, c, input=x) for f in BOTH.values())
    assert ours.stride() == native.stride()


def test_empty_batch_counts_but_moves_no_statistics():
    ours, native = bnorm_ext.BatchNorm2d(5), nn.BatchNorm2d(5)
    for momentum in (0.1, None):
        for module in (ours, native):
            module.momentum = momentum
            module(torch.empty(0, 5, 3, 2)).sum().backward()
    for (name, a), b in zip(ours.named_buffers(), native.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert ours.num_batches_tracked.item() == 2
    for a, b in zip(ours.parameters(), native.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@MODES
def test_empty_evaluation_without_statistics(training):
    x = torch.empty(0, 5)
    assert outcome(lambda: bnorm_ext.batch_norm(x, None, None, training=training)) == outcome(
        lambda: F.batch_norm(x, None, None, training=training)
    )


# ---- Which gradients there are ------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_those_that_require_them(wanted, given, training):
    """x, weight and bias: given or not, requiring a gradient or not."""
    c = make(training)
    right = run(F.batch_norm, c)
    leaves = {"input": c.x, "weight": c.weight, "bias": c.bias}
    for name, there in zip(("weight", "bias"), given, strict=True):
        if not there:
            leaves[name] = None
    for (name, t), want in zip(leaves.items(), wanted, strict=True):
        leaves[name] = t if t is None else t.detach().requires_grad_(want)
    y = call(bnorm_ext.batch_norm, c, **leaves)
    asked = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    assert y.requires_grad == bool(asked)
    if not asked:
        return
    y.backward(c.dy)
    plain = run(F.batch_norm, c.but(weight=leaves["weight"], bias=leaves["bias"]))
    for name, t in leaves.items():
        if name in asked:
            right = plain["dx" if name == "input" else f"d{name}"]
            # float64, sums of 24 terms below 10: far under 1e-12.
            torch.testing.assert_close(t.grad, right, rtol=0, atol=1e-12)
        else:
            assert t is None or t.grad is None


@MODES
def test_grad_of_a_subset_of_inputs(training):
    c = make(training)
    leaves = [t.detach().requires_grad_() for t in (c.x, c.weight, c.bias)]
    whole = run(F.batch_norm, c)
    names = ["dx", "dweight", "dbias"]
    for subset in ([0], [1], [2], [0, 1], [1, 2], [0, 2], [2, 1, 0]):
        y = call(bnorm_ext.batch_norm, c, input=leaves[0], weight=leaves[1], bias=leaves[2])
        for i, t in zip(
            subset, torch.autograd.grad(y, [leaves[i] for i in subset], c.dy), strict=True
        ):
            torch.testing.assert_close(t, whole[names[i]], rtol=0, atol=1e-12)


@MODES
def test_backward_twice_with_retained_graph(training):
    c = make(training)
    x = c.x.clone().requires_grad_()
    y = call(bnorm_ext.batch_norm, c, input=x)
    first = torch.autograd.grad(y, x, c.dy, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, c.dy)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, c.dy)


@pytest.mark.parametrize("name", ["mean", "rstd"])
def test_statistics_of_the_operator_are_not_differentiable(name):
    x = normal(SHAPE, 0).requires_grad_()
    out = torch.ops.bnorm_ext.batch_norm_training(x, None, None, None, None, None, None, 0.1, 1e-5)
    assert out[0].requires_grad
    assert not out[1 if name == "mean" else 2].requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    """The forward pass runs twice: so do the running statistics, as native's."""
    results = []
    for kind in (bnorm_ext.BatchNorm1d, nn.BatchNorm1d):
        module = kind(5, dtype=torch.float64)
        x = normal(SHAPE[:3], 0, 1).requires_grad_()
        y = checkpoint(module, x, use_reentrant=use_reentrant)
        (y * normal(SHAPE[:3], 1)).sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=0, atol=1e-12)
    assert results[0][-1].item() == 2


def test_nothing_is_kept_alive_after_the_output():
    """mean and rstd are outputs that their own node saves; that must not be a cycle."""
    x = normal(SHAPE, 0).requires_grad_()
    out = torch.ops.bnorm_ext.batch_norm_training(x, None, None, None, None, None, None, 0.1, 1e-5)
    alive = [weakref.ref(t) for t in (x, *out)]
    del x, out
    assert [ref() for ref in alive] == [None] * 5


# ---- Grad modes ---------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_grad_modes(mode, training):
    c = make(training)
    results = []
    for function in BOTH.values():
        d = c.but(running_mean=c.running_mean.clone(), running_var=c.running_var.clone())
        with mode():
            y = call(function, d, input=c.x.detach().requires_grad_())
        results.append((y.requires_grad, y.is_inference(), y.is_leaf))
        assert d.running_mean is not None
        assert torch.equal(d.running_mean, c.running_mean) != training
    assert results[0] == results[1]


@pytest.mark.parametrize("outside", [True, False])
def test_buffers_made_in_inference_mode(outside):
    """They have no version counter; native updates them all the same."""
    x = normal((6, 5), 0).float()
    found = []
    for function in BOTH.values():
        with torch.inference_mode():
            mean, var = torch.zeros(5), torch.ones(5)
        with torch.inference_mode(not outside):
            seen = outcome(lambda f=function, m=mean, v=var: f(x, m, v, training=True))
        found.append((seen, mean.eq(0).all().item()))
    assert found[0] == found[1]


def test_input_made_in_inference_mode_is_refused_where_a_gradient_is_due():
    with torch.inference_mode():
        x = torch.randn(6, 5)
    weight = torch.ones(5, requires_grad=True)
    ours, native = (
        outcome(lambda f=f: f(x, None, None, weight, training=True)) for f in BOTH.values()
    )
    assert native is not None
    assert ours == native


# ---- Version counters ---------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("gradient", [True, False])
def test_versions(training, gradient):
    """One step for each buffer that a training call changes in place, none for anything else."""
    c = make(training)
    counter = torch.tensor(3)
    x = c.x.clone().requires_grad_(gradient)
    tensors = [c.running_mean, c.running_var, counter, x, c.weight, c.bias]
    before = [t._version for t in tensors]
    bnorm_ext.batch_norm(
        x, c.running_mean, c.running_var, c.weight, c.bias, training, num_batches_tracked=counter
    )
    moved = [t._version - v for t, v in zip(tensors, before, strict=True)]
    assert moved == [int(training)] * 3 + [0] * 3
    assert counter.item() == 3 + int(training)


CHANGES = {
    "input": lambda t: t["input"].mul_(2),
    "weight": lambda t: t["weight"].mul_(2),
    "bias": lambda t: t["bias"].mul_(2),
    "output": lambda t: t["output"].mul_(2),
    "running_mean": lambda t: t["running_mean"].add_(1),
    "running_var": lambda t: t["running_var"].add_(1),
}


@MODES
@pytest.mark.parametrize("changed", CHANGES)
def test_in_place_changes_before_backward(changed, training):
    """Native's verdict, but for the running statistics in training, which ours does not save."""
    found = []
    for function in BOTH.values():
        c = make(training)
        tensors = {
            "input": c.x.clone().requires_grad_().clone(),
            "weight": c.weight.clone().requires_grad_().clone(),
            "bias": c.bias.clone().requires_grad_().clone(),
            "running_mean": c.running_mean.clone(),
            "running_var": c.running_var.clone(),
        }
        y = function(*(tensors[n] for n in (
            "input", "running_mean", "running_var", "weight", "bias")), training)  # fmt: skip
        tensors["output"] = y
        CHANGES[changed](tensors)
        found.append(outcome(y.sum().backward))
    if training and changed.startswith("running"):
        assert found[1] is not None
        assert found[0] is None
        return
    assert (found[0] is None) == (found[1] is None)
    if found[0] is not None:
        assert found[0][0] is found[1][0] is RuntimeError
        assert "modified by an inplace operation" in found[0][1]
