"""torch.func transforms and forward-mode AD: the Python Function, against the C++ one to the bit
and against native or plain torch in value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)  # fmt: skip
from torch.fx.experimental.proxy_tensor import make_fx

import bnorm_ext

B, C = 5, 3
MODES = [True, False]
ALL = (0, 1, 2)


def arguments(dtype=torch.float64):
    x = torch.randn(B, 4, C, 2, 2, dtype=dtype) + 1
    return x, torch.randn(C, dtype=dtype), torch.randn(C, dtype=dtype)


def batch_norm(training, implementation=bnorm_ext.batch_norm):
    mean, var = torch.linspace(-1, 1, C), torch.linspace(0.5, 2, C)

    def f(x, weight, bias):
        running = (None, None) if training else (mean.to(x.dtype), var.to(x.dtype))
        return implementation(x, *running, weight, bias, training)

    return f


def plain(x, weight, bias):
    """Training in plain torch operations, whose derivatives of any order are autograd's own."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    weight, bias = (t.reshape(1, -1, 1, 1) for t in (weight, bias))
    return (x - mean) * (var + 1e-5).rsqrt() * weight + bias


def cubed(f):
    return lambda *given: (f(*given) ** 3).sum()


def flatten(nested):
    return [t for row in nested for t in row]


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def assert_close(actual, expected):
    # Double, short sums, derivatives up to second order: 1e-9 is some 1e6 roundoffs.
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", MODES)
def test_vmap_is_a_loop_to_the_bit(training, dtype):
    f = batch_norm(training)
    x, weight, bias = arguments(dtype)
    weights = torch.randn(B, C, dtype=dtype)
    cases = [
        ((0, None, None), (x, weight, bias), [(xi, weight, bias) for xi in x]),
        ((None, 0, None), (x[0], weights, bias), [(x[0], w, bias) for w in weights]),
        (
            (2, 1, None),
            (x.movedim(0, 2), weights.T.contiguous(), bias),
            [(x[i], weights[i], bias) for i in range(B)],
        ),
    ]
    for in_dims, mapped, one_by_one in cases:
        assert torch.equal(vmap(f, in_dims)(*mapped), torch.stack([f(*g) for g in one_by_one]))


@pytest.mark.parametrize("training", MODES)
def test_grad_is_eager_autograd_to_the_bit(training):
    f = cubed(batch_norm(training))
    x, *affine = arguments()
    inputs = [t.clone().requires_grad_() for t in (x[0], *affine)]
    eager = torch.autograd.grad(f(*inputs), inputs)
    assert_equal(grad(f, ALL)(x[0], *affine), eager)
    # One gradient per sample: also a loop, to the bit.
    per_sample = vmap(grad(f, ALL), (0, None, None))(x, *affine)
    loop = [grad(f, ALL)(xi, *affine) for xi in x]
    assert_equal(per_sample, [torch.stack(g) for g in zip(*loop, strict=True)])


def test_grad_in_inference_has_the_bits_of_eager_in_float32():
    """1 / sqrt(running_var + eps) is rounded once, from float64, in both."""
    x, mean, var = torch.randn(4, 200), torch.randn(200), torch.rand(200) + 0.1
    weight = torch.randn(200)

    def f(x, weight):
        return bnorm_ext.batch_norm(x, mean, var, weight).sum()

    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    assert_equal(grad(f, (0, 1))(x, weight), torch.autograd.grad(f(*inputs), inputs))


@pytest.mark.parametrize("training", MODES)
def test_jvp_and_jacobians(training):
    ours, native = batch_norm(training), batch_norm(training, F.batch_norm)
    x, weight, bias = arguments()
    given = (x[0], weight, bias)
    tangents = tuple(torch.randn_like(t) for t in given)
    assert_close(jvp(ours, given, tangents), jvp(native, given, tangents))
    expected = jacrev(native, ALL)(*given)
    assert_close(jacfwd(ours, ALL)(*given), expected)
    assert_close(jacrev(ours, ALL)(*given), expected)


SECOND = {
    "hessian": lambda f: hessian(f, ALL),
    "reverse over reverse": lambda f: jacrev(jacrev(f, ALL), ALL),
    "reverse over forward": lambda f: jacrev(jacfwd(f, ALL), ALL),
    "forward over forward": lambda f: jacfwd(jacfwd(f, ALL), ALL),
}


@pytest.mark.parametrize("order", SECOND)
def test_second_derivatives_in_training(order):
    x, weight, bias = arguments()
    given = (x[0], weight, bias)
    expected = flatten(jacrev(jacrev(cubed(plain), ALL), ALL)(*given))
    assert_close(flatten(SECOND[order](cubed(batch_norm(True)))(*given)), expected)


def test_native_loses_a_second_derivative():
    """Why the test above compares with plain torch. Native's derivative of dweight with respect to
    x lacks terms under torch.func; if this fails, native has been mended."""
    x, weight, bias = arguments()
    given = (x[0], weight, bias)
    expected = flatten(hessian(cubed(plain), ALL)(*given))
    native = flatten(hessian(cubed(batch_norm(True, F.batch_norm)), ALL)(*given))
    errors = [(a - e).abs().max().item() for a, e in zip(native, expected, strict=True)]
    assert max(errors) > 1


@pytest.mark.parametrize("order", SECOND)
def test_second_derivatives_in_inference(order):
    x, weight, bias = arguments()
    given = (x[0], weight, bias)
    native = cubed(batch_norm(False, F.batch_norm))
    expected = flatten(jacrev(jacrev(native, ALL), ALL)(*given))
    assert_close(flatten(SECOND[order](cubed(batch_norm(False)))(*given)), expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_updates_batched_buffers_like_a_loop(momentum):
    x, weight, bias = arguments()
    mean, var, count = torch.randn(B, C).double(), torch.rand(B, C).double(), torch.arange(B)
    mapped = [t.clone() for t in (mean, var, count)]

    def f(x, mean, var, count):
        return bnorm_ext.batch_norm(
            x, mean, var, weight, bias, True, momentum, num_batches_tracked=count
        )

    y = vmap(f)(x, *mapped)
    for i in range(B):
        buffers = [t[i].clone() for t in (mean, var, count)]
        assert torch.equal(y[i], f(x[i], *buffers))
        assert_equal([t[i] for t in mapped], buffers)


@pytest.mark.parametrize("dims", [(1, 0, 0), (0, 1, 0)])
def test_vmap_updates_buffers_mapped_over_any_dimension(dims):
    x, weight, bias = arguments()
    mean, var = torch.randn(B, C).double(), torch.rand(B, C).double()
    mapped = [t.movedim(0, d).contiguous() for t, d in zip((mean, var), dims[:2], strict=True)]
    vmap(
        lambda x, mean, var: bnorm_ext.batch_norm(x, mean, var, weight, bias, True),
        (0, *dims[:2]),
    )(x, *mapped)
    for i in range(B):
        bnorm_ext.batch_norm(x[i], mean[i], var[i], weight, bias, True)
    assert_equal([t.movedim(d, 0) for t, d in zip(mapped, dims[:2], strict=True)], [mean, var])


def test_vmap_refuses_one_buffer_for_many_batches_with_natives_text():
    x, weight, bias = arguments()
    buffers = torch.zeros(C).double(), torch.ones(C).double()
    texts = []
    for implementation in (bnorm_ext.batch_norm, F.batch_norm):
        with pytest.raises(RuntimeError) as error:
            vmap(lambda x, f=implementation: f(x, *buffers, weight, bias, True))(x)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert torch.equal(buffers[0], torch.zeros(C).double())


def test_grad_updates_captured_buffers_as_native_does():
    x, weight, bias = arguments()
    results = []
    for implementation in (bnorm_ext.batch_norm, F.batch_norm):
        mean, var = torch.zeros(C).double(), torch.ones(C).double()
        grad(lambda x, f=implementation: f(x, mean, var, weight, bias, True).sum())(x[0])  # noqa: B023
        results.append((mean, var))
    assert_close(results[0], results[1])
    assert results[0][0].abs().min() > 0


def test_ensemble_of_modules():
    """torch.func's recipe for ensembling: stacked parameters and buffers under vmap."""
    modules = [bnorm_ext.BatchNorm2d(4) for _ in range(3)]
    for module in modules:
        nn.init.normal_(module.weight)
    x = torch.randn(3, 2, 4, 3, 3)
    parameters, buffers = stack_module_state(modules)
    y = vmap(lambda p, b, x: functional_call(modules[0], (p, b), (x,)))(parameters, buffers, x)
    for i, module in enumerate(modules):
        assert torch.equal(y[i], module(x[i]))
        for name, buffer in module.named_buffers():
            assert torch.equal(buffers[name][i], buffer)


def test_dual_numbers_without_functorch():
    x, weight, bias = arguments()
    tangent = torch.randn_like(x[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], tangent)
        y, dy = forward_ad.unpack_dual(batch_norm(True)(dual, weight, bias))
    assert torch.equal(y, batch_norm(True)(x[0], weight, bias))
    assert_close([dy], [jvp(lambda x: plain(x, weight, bias), (x[0],), (tangent,))[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", MODES)
def test_mixed_dtypes(training, dtype):
    x = torch.randn(4, C, 2, 2, dtype=dtype)
    weight, bias = torch.randn(C), torch.randn(C)
    running = (None, None) if training else (torch.zeros(C), torch.ones(C))

    def f(x, weight):
        return bnorm_ext.batch_norm(x, *running, weight, bias, training)

    y, tangent = jvp(f, (x, weight), (torch.ones_like(x), torch.ones_like(weight)))
    assert y.dtype == tangent.dtype == dtype
    assert torch.equal(y, f(x, weight))
    dx, dweight = grad(lambda *g: f(*g).float().square().sum(), (0, 1))(x, weight)
    assert (dx.dtype, dweight.dtype) == (dtype, torch.float32)


def test_gradient_in_inference_does_not_read_x():
    """As in eager mode: the statistics are constants, so an infinite x leaves dx finite."""
    x, weight, bias = arguments()
    x = x[0].clone()
    x[0, 0, 0, 0] = float("inf")
    f, dy = batch_norm(False), torch.randn_like(x)
    eager = torch.autograd.grad(f(x.requires_grad_(), weight, bias), x, dy)
    assert eager[0].isfinite().all()
    assert_equal(torch.func.vjp(lambda x: f(x, weight, bias), x.detach())[1](dy), eager)


def test_empty_batch():
    x = torch.randn(B, 0, C, 2, 2)
    assert vmap(lambda x: batch_norm(True)(x, None, None))(x).shape == x.shape


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("act", [None, "relu"])
def test_functionalize(training, act):
    """It has no rule for autograd Functions: native's operations are taken."""
    x, weight, bias = arguments()
    buffers = torch.zeros(C, dtype=x.dtype), torch.ones(C, dtype=x.dtype)
    mean, var = (t.clone() for t in buffers)

    def ours(x):
        return bnorm_ext.batch_norm(x, mean, var, weight, bias, training, act=act)

    expected = F.batch_norm(x[0], *buffers, weight, bias, training)
    expected = expected if act is None else expected.relu()
    assert torch.equal(functionalize(ours)(x[0]), expected)
    assert torch.equal(mean, buffers[0])
    traced = make_fx(functionalize(ours))(x[0])
    names = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in name for name in names)
    assert not any(name.startswith("bnorm_ext") for name in names)
