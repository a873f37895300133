"""Forward-mode differentiation of a backward pass whose forward pass ran without: the tangent comes
with the gradient of the output, as from a head that is differentiated afterwards. Tangents are
those of plain torch operations, and a transform of torch.func over the backward pass works."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor

import bnorm_ext
from tests.common.cases import normal

ACTS = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish")
SHAPE = (4, 3, 5)


def tensors(dtype=torch.double) -> dict[str, Tensor]:
    x, residual = (normal(SHAPE, seed).to(dtype) for seed in (1, 2))
    weight, bias = (normal((3,), seed).to(dtype) + 1 for seed in (3, 4))
    found = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return {name: t.requires_grad_() for name, t in found.items()}


def plain(x, residual, weight, bias, training, act):
    """From operations that torch differentiates in both modes, any number of times."""
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    if training:
        mean = x.mean((0, 2))
        var = (x - mean[:, None]).square().mean((0, 2))
    xhat = (x - mean[:, None]) / (var + 1e-5).sqrt()[:, None]
    z = weight[:, None] * xhat + bias[:, None]
    z = z if residual is None else z + residual
    if act == "silu":
        return z * z.sigmoid()
    if act == "hardswish":
        return z * (z + 3).clamp(0, 6) / 6
    if act == "relu6":
        return z.clamp(0, 6)
    slope = {"identity": 1.0, "relu": 0.0, "leaky_relu": 0.01}[act]
    return torch.where(z > 0, z, z * slope)


def ours(x, residual, weight, bias, training, act):
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    return bnorm_ext.batch_norm(
        x, mean, var, weight, bias, training, residual=residual, act=act, negative_slope=0.01
    )


def both(derive, training, act="identity", with_residual=False):
    """What ``derive(y, inputs)`` gives, by plain operations and by ours."""
    results = []
    for function in (plain, ours):
        t = tensors()
        residual = t["residual"] if with_residual else None
        y = function(t["x"], residual, t["weight"], t["bias"], training, act)
        wanted = [t["x"], t["weight"], t["bias"], *([residual] if with_residual else [])]
        results.append(derive(y, wanted))
    return results


def assert_same(expected, found):
    for a, b in zip(expected, found, strict=True):
        assert b is not None
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


TANGENT, COTANGENT = normal(SHAPE, 8).double(), normal(SHAPE, 9).double()


def tangents(y, inputs, **options):
    with fw.dual_level():
        dy = fw.make_dual(COTANGENT.clone(), TANGENT)
        gradients = torch.autograd.grad(y, inputs, dy, **options)
        return [part for g in gradients for part in fw.unpack_dual(g)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("act", ACTS)
def test_tangent_of_the_gradients(act, with_residual, training):
    assert_same(*both(tangents, training, act, with_residual))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_with_a_graph_of_the_backward_pass(training):
    assert_same(*both(lambda *a: tangents(*a, create_graph=True), training, "silu", True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_through_a_second_backward_pass(training):
    def derive(y, inputs):
        gradients = torch.autograd.grad(y.pow(3).sum(), inputs[:1], create_graph=True)
        return tangents(gradients[0], inputs)

    assert_same(*both(derive, training))


TRANSFORMS = {
    "jvp": lambda f: torch.func.jvp(f, (COTANGENT,), (TANGENT,))[1],
    "jacfwd": lambda f: torch.func.jacfwd(f)(COTANGENT),
    "jacrev": lambda f: torch.func.jacrev(f)(COTANGENT),
    "grad": lambda f: torch.func.grad(lambda dy: f(dy).square().sum())(COTANGENT),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([COTANGENT, TANGENT])),
    "jacobian": lambda f: torch.autograd.functional.jacobian(
        f, COTANGENT, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("create_graph", [False, True], ids=["", "graph"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_backward_pass(name, training, create_graph):
    def derive(y, inputs):
        def dx(dy):
            options = {"retain_graph": True, "create_graph": create_graph}
            return torch.autograd.grad(y, inputs[0], dy, **options)[0]

        return [TRANSFORMS[name](dx)]

    assert_same(*both(derive, training))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    t = tensors(dtype)
    y = ours(t["x"], t["residual"], t["weight"], t["bias"], True, "relu")
    with fw.dual_level():
        dy = fw.make_dual(COTANGENT.to(dtype), TANGENT.to(dtype))
        found = torch.autograd.grad(y, [*t.values()], dy)
        for gradient, input in zip(found, t.values(), strict=True):
            for part in fw.unpack_dual(gradient):
                assert (part.dtype, part.shape) == (dtype, input.shape)


@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference"])
def test_an_operator_refuses_a_tangent_instead_of_losing_it(name):
    x, v = COTANGENT.clone(), torch.ones(3, dtype=torch.double)
    rest = (None, 0.1, 1e-5) if name == "batch_norm_training" else (1e-5,)
    with fw.dual_level():
        dual = fw.make_dual(x, TANGENT)
        with pytest.raises(NotImplementedError, match=f"use forward AD with {name}"):
            getattr(torch.ops.bnorm_ext, name)(dual, None, v, v, v.clone(), v.clone(), *rest)
