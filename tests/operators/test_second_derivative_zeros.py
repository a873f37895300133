"""Which second derivatives are zeros and which are absent: as of the composition of native's batch
norm, addition and activation, so that a gradient penalty finds a gradient for every parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnorm_ext
from bnorm_ext.activations import NAMES, compose

ACTS = pytest.mark.parametrize("act", NAMES)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["alone", "addition"])
f64 = torch.float64
GIVEN = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=f64)
    for i, (name, shape) in enumerate(
        {"x": (4, 3, 2, 2), "residual": (4, 3, 2, 2), "weight": (3,), "bias": (3,),
         "dy": (4, 3, 2, 2)}.items()
    )
}  # fmt: skip


def native(x, mean, var, weight, bias, training, *, residual, act):
    return compose(F.batch_norm(x, mean, var, weight, bias, training), residual, act, 0.01)


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = list(names)
    return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


def attempt(call: Callable[[], Any]) -> Any:
    """What came of it: an error's first words, or which gradients there are and which are 0."""
    try:
        values = call()
    except RuntimeError as error:
        return str(error)[:60], None
    kinds = [None if v is None else (v.shape, v.dtype, bool((v == 0).all())) for v in values]
    return kinds, values


def second(
    function: Callable[..., Tensor],
    shared: dict[str, Any],
    leaves: tuple[str, ...],
    first: tuple[str, ...],
) -> list[Any]:
    """The gradients of a sum of first gradients, asked for in every way."""
    t: dict[str, Any] = {name: value.clone() for name, value in GIVEN.items()}
    for name in leaves:
        t[name].requires_grad_()
    if "residual" not in shared["given"]:
        t["residual"] = None
    for name in ("weight", "bias"):
        if name not in shared["given"]:
            t[name] = None
    y = function(
        t["x"], torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64), t["weight"], t["bias"],
        shared["training"], residual=t["residual"], act=shared["act"],
    )  # fmt: skip
    gradients = torch.autograd.grad(y, [t[n] for n in first], t["dy"], create_graph=True)
    total = torch.stack([(g * (1 + g)).sum() for g in gradients]).sum()
    inputs = [t[n] for n in leaves]

    def backward() -> list[Tensor | None]:
        total.backward()
        return [v.grad for v in inputs]

    return [
        attempt(lambda: torch.autograd.grad(total, inputs, retain_graph=True)),
        attempt(lambda: torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)),
        attempt(
            lambda: torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)
        ),
        attempt(backward),
    ]


@RESIDUAL
@TRAINING
@ACTS
def test_every_combination(act, training, residual):
    kinds = set()
    for affine in ((), ("weight",), ("weight", "bias")):
        given = ["x", *affine, *(["residual"] if residual else [])]
        shared = {"given": given, "training": training, "act": act}
        for leaves in subsets([*given, "dy"]):
            firsts = subsets(name for name in leaves if name != "dy")
            # One alone and all together; what lies between brings nothing new.
            for first in [f for f in firsts if len(f) == 1 or f == firsts[-1]]:
                ours = second(bnorm_ext.batch_norm, shared, leaves, first)
                theirs = second(native, shared, leaves, first)
                assert [a[0] for a in ours] == [b[0] for b in theirs], (leaves, first)
                kinds |= {str(b[0]) for b in theirs}
                for a, b in zip(ours, theirs, strict=True):
                    for v, w in zip(a[1] or (), b[1] or (), strict=True):
                        if v is not None:
                            # Sums of up to 48 terms below 100, in float64.
                            torch.testing.assert_close(v, w, rtol=1e-9, atol=1e-10)
    assert len(kinds) > 4


def of_bias_without_weight(
    function: Callable[..., Tensor], weight: Tensor | None, act: str
) -> tuple[Tensor, ...]:
    t = {n: GIVEN[n].clone().requires_grad_() for n in ("x", "residual", "bias", "dy")}
    buffers = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
    y = function(t["x"], *buffers, weight, t["bias"], True, residual=t["residual"], act=act)
    asked = [t["x"], t["residual"], t["bias"]]
    first = torch.autograd.grad(y, asked, t["dy"], create_graph=True)
    return torch.autograd.grad(sum((g * (1 + g)).sum() for g in first), [*t.values()])


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_bias_without_weight(act):
    """Native has no second derivative then: beside a weight of ones."""
    ours = of_bias_without_weight(bnorm_ext.batch_norm, None, act)
    theirs = of_bias_without_weight(native, torch.ones(3, dtype=f64), act)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)


@RESIDUAL
@TRAINING
@ACTS
def test_gradient_penalty(act, training, residual):
    """As a Wasserstein critic computes it: every parameter has a gradient, if of zeros."""

    def gradients(cls: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        before, after = nn.Conv2d(2, 3, 3).double(), nn.Conv2d(3, 1, 2).double()
        norm = nn.BatchNorm2d(3, dtype=f64).train(training)
        fused = bnorm_ext.BatchNormAct2d(3, act=act, dtype=f64).train(training)
        fused.load_state_dict(norm.state_dict())
        images = torch.randn(4, 2, 6, 6, dtype=f64).requires_grad_()
        z = before(images)
        other = z.cos() if residual else None
        if cls == "native":
            y = compose(norm(z), other, act, 0.01)
        else:
            y = fused(z, other)
        score = after(y).sum()
        (dx,) = torch.autograd.grad(score, images, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        used = norm if cls == "native" else fused
        parameters = [*before.parameters(), *used.parameters(), after.weight]
        return torch.autograd.grad(penalty, parameters, allow_unused=True)

    for ours, theirs in zip(gradients("ours"), gradients("native"), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@TRAINING
def test_the_residual_is_not_kept_for_it(training):
    """The zeros of a residual need its shape alone; a mask stands for its content."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    leaf = GIVEN["residual"].clone().requires_grad_()
    residual = leaf * 1
    x = GIVEN["x"].clone().requires_grad_()
    statistics = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = bnorm_ext.batch_norm(x, *statistics, training=training, residual=residual, act="relu")
    assert residual.data_ptr() not in [t.data_ptr() for t in saved]
    del residual
    (dx,) = torch.autograd.grad(y, x, GIVEN["dy"], create_graph=True)
    (zeros,) = torch.autograd.grad(dx.square().sum(), leaf)
    assert torch.equal(zeros, torch.zeros_like(leaf))


def test_the_slope_of_a_leaky_relu_is_of_double_precision():
    x = GIVEN["x"].clone().requires_grad_()
    dy = GIVEN["dy"].clone().requires_grad_()
    statistics = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
    y = bnorm_ext.batch_norm(x, *statistics, act="leaky_relu", negative_slope=0.1)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (slopes,) = torch.autograd.grad(dx.sum(), dy)
    # Two roundings of float64; 0.1 in float32 is off by 1.5e-8.
    right = torch.where(x > 0, 1.0, torch.tensor(0.1, dtype=f64)) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(slopes, right, rtol=1e-15, atol=0)
