"""Derivatives of batch norm with residual and activation: of any order, under torch.func, compiled,
exported."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck

import bnorm_ext
from tests.common.fused_cases import ACTS, SLOPE, activate, make, ours, run

ops = torch.ops.bnorm_ext
RESIDUAL = [False, True]


def arguments(with_residual, dtype=torch.float64):
    x, r = (torch.randn(3, 2, 2, 3, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(2, dtype=dtype).requires_grad_() for _ in range(2))
    return (x, weight, bias, r) if with_residual else (x, weight, bias)


def function(act, training, implementation=ours):
    mean, var = torch.tensor([0.3, -0.2]), torch.tensor([0.8, 1.7])

    def f(x, weight, bias, r=None):
        running = (None, None) if training else (mean.to(x.dtype), var.to(x.dtype))
        return implementation(x, *running, weight, bias, training, 0.1, 1e-5, residual=r, act=act)

    return f


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", RESIDUAL)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck(act, with_residual, training):
    given = arguments(with_residual)
    f = function(act, training)
    assert gradcheck(f, given)
    assert gradgradcheck(f, given)
    last = [t.detach() for t in given]
    for i, t in enumerate(last):
        if t.dim() == 4:
            last[i] = t.contiguous(memory_format=torch.channels_last)
        last[i].requires_grad_()
    assert gradgradcheck(f, tuple(last))


@pytest.mark.parametrize("with_residual", RESIDUAL)
@pytest.mark.parametrize("act", ["silu", "leaky_relu"])
def test_third_derivatives(act, with_residual):
    given = arguments(with_residual)
    f = function(act, True)

    def gradient(*given):
        return torch.autograd.grad(f(*given).sin().sum(), given, create_graph=True)

    assert gradgradcheck(lambda *a: gradient(*a)[0], given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", RESIDUAL)
@pytest.mark.parametrize("act", ACTS)
def test_forward_mode_and_batched(act, with_residual, training):
    given = arguments(with_residual)
    assert gradcheck(
        function(act, training), given, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


def plain(x, mean, var, weight, bias, training, momentum, eps, *, residual, act):
    """Training in plain torch operations."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    weight, bias = (t.reshape(1, -1, 1, 1) for t in (weight, bias))
    z = (x - mean) * (var + eps).rsqrt() * weight + bias
    return activate(z if residual is None else z + residual, act)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_transforms(act):
    given = tuple(t.detach() for t in arguments(True))
    mine, right = function(act, True), function(act, True, plain)
    every = (0, 1, 2, 3)

    def total(f):
        return lambda *a: (f(*a) ** 3).sum()

    close = {"rtol": 1e-9, "atol": 1e-9}
    for a, b in zip(grad(total(mine), every)(*given), grad(total(right), every)(*given),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, **close)
    tangents = tuple(torch.randn_like(t) for t in given)
    for a, b in zip(jvp(mine, given, tangents), jvp(right, given, tangents), strict=True):
        torch.testing.assert_close(a, b, **close)
    for row, row2 in zip(hessian(total(mine), every)(*given), hessian(total(right), every)(*given),
                         strict=True):  # fmt: skip
        for a, b in zip(row, row2, strict=True):
            torch.testing.assert_close(a, b, **close)
    batched = tuple(torch.stack([t, t * 0.5 + 1]) for t in given)
    one_by_one = [mine(*(t[i] for t in batched)) for i in range(2)]
    torch.testing.assert_close(vmap(mine)(*batched), torch.stack(one_by_one), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transforms_give_what_eager_gives(dtype):
    """To a unit in the last place: silu's exp is torch's there."""
    f = make((6, 5, 4, 4), dtype, "contiguous", "silu", True, True)
    c = f.c

    def call(x, buffers):
        return ours(
            x, *buffers, c.weight, c.bias, True, 0.1, c.eps, residual=f.residual, act="silu"
        )

    eager, transformed = ([t.clone() for t in (c.running_mean, c.running_var)] for _ in range(2))
    y = call(c.x, eager)
    z, _ = jvp(lambda x: call(x, transformed), (c.x,), (torch.ones_like(c.x),))
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(z, y, rtol=2 * u, atol=4 * torch.finfo(torch.float32).eps)
    for a, b in zip(eager, transformed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = bnorm_ext.BatchNormAct2d(8, act="silu")
        self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = bnorm_ext.BatchNormAct2d(8, act="relu")
        self.bn3 = bnorm_ext.BatchNormAct2d(8, act=torch.nn.LeakyReLU(0.2))

    def forward(self, x):
        x = self.bn1(self.conv(x))
        return self.bn3(self.bn2(self.conv2(x), x), x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    net = Net()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend=backend, dynamic=True)
    for n in (4, 6):
        x = torch.randn(n, 3, 9, 8)
        y, z = net(x), compiled(x)
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        z.square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=2e-3)
    for p, q in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(q, p)
    net.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)


def test_export():
    net = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.batch_norm.default" in targets
    assert not [target for target in targets if "bnorm_ext" in target]


ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5), (3, 150, 3, 3), (2, 3, 20, 20), (5, 1, 9)])
def test_opcheck(shape, act, grad, device):
    """The fakes know how long a mask is in every case."""
    C = shape[1]
    x, r, dy = (torch.randn(shape, device=device, requires_grad=grad) for _ in range(3))
    weight, bias = (torch.randn(C, device=device, requires_grad=grad) for _ in range(2))
    mean, var = torch.zeros(C, device=device), torch.ones(C, device=device)
    if len(shape) == 4 and shape[2] == 5:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad)

    def check(op, *arguments):
        assert opcheck(op.default, arguments) == dict.fromkeys(ALL, "SUCCESS")

    tail = (act, SLOPE, True)
    counter = torch.tensor(3, device=device)
    check(ops.batch_norm_training, x, r, weight, bias, mean, var, counter, 0.1, 1e-5, *tail)
    check(ops.batch_norm_inference, x, r, weight, bias, mean, var, 1e-5, *tail)
    want = (act, SLOPE, [True, True, True, True])
    train, inference = (None, None, mean, var, True, 1e-5), (mean, var, None, None, False, 1e-5)
    check(ops.batch_norm_backward, dy, x, r, weight, bias, *train, None, *want)
    check(ops.batch_norm_backward, dy, x, r, weight, bias, *inference, None, *want)
    if act == "relu":
        with torch.no_grad():
            mask = ops.batch_norm_apply(x, r, weight, bias, mean, var, *tail)[1]
        assert mask.numel() > 0
        check(ops.batch_norm_backward, dy, x, None, weight, bias, *train, mask, *want)
    if not grad:
        check(ops.batch_norm_apply, x, r, weight, bias, mean, var, *tail)
        check(ops.batch_norm_backward_reduce, dy, x, r, weight, bias, mean, var, None, act, SLOPE)
        check(ops.batch_norm_backward_apply, dy, x, r, weight, bias, mean, var, None, mean, mean,
              act, SLOPE)  # fmt: skip


def test_two_forward_passes_before_one_backward():
    """Nothing that a later forward pass changes is needed."""
    layer = bnorm_ext.BatchNormAct2d(3, act="relu")
    x, r = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    expected = torch.autograd.grad(
        F.relu(F.batch_norm(x, None, None, layer.weight, layer.bias, True) + r).sum(), layer.weight
    )
    y = layer(x, r)
    layer(torch.randn(4, 3, 5, 5), r)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.weight), expected)


def test_autograd_in_16_bit_keeps_types():
    for act in ACTS:
        f = make((4, 6, 4, 4), torch.bfloat16, "contiguous", act, True, True)
        seen = {name: t.dtype for name, t in run(ours, f).items()}
        half = dict.fromkeys(("y", "dx", "dresidual"), torch.bfloat16)
        assert seen == {**dict.fromkeys(seen, torch.float32), **half}
