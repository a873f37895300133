"""torch.compile, torch.export, FX, TorchScript and autocast around the operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext


class Net(nn.Module):
    """Every kind of batch norm module: affine, cumulative average, without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)
        self.fc, self.bn3 = nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.fc(self.bn2(self.conv2(x)).mean((2, 3))))


@pytest.fixture
def net() -> nn.Module:
    torch._dynamo.reset()
    return bnorm_ext.convert_batchnorm(Net())


def assert_near(actual, expected):
    # Compiled convolutions and sums are in another order; three layers of float, gradients of 1e2.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_whole_net(net, backend):
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=backend)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        y, z = net(x), compiled(x)
        assert_near(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
    for p, q in zip(net.parameters(), compiled.parameters(), strict=True):
        assert_near(q.grad, p.grad)
    for p, q in zip(net.buffers(), compiled.buffers(), strict=True):
        assert_near(q, p)
    assert compiled.bn2.num_batches_tracked == 3
    net.eval(), compiled.eval()
    assert_near(compiled(x), net(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_keeps_memory_format_with_dynamic_shapes(channels_last):
    torch._dynamo.reset()
    f = torch.compile(bnorm_ext.batch_norm, fullgraph=True, dynamic=True)
    for n in (4, 6, 9):
        x = torch.randn(n, 3, 8, n)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        weight = torch.ones(3, requires_grad=True)
        mean, var = torch.zeros(3), torch.ones(3)
        y = f(x, mean, var, weight, None, True)
        (y**2).sum().backward()
        assert y.stride() == x.stride() == x.grad.stride()
        assert mean.abs().min() > 0


def test_compile_under_transforms():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 4, 5)

    def f(x):
        return bnorm_ext.batch_norm(x, None, None, None, None, True)

    mapped = torch.compile(lambda x: torch.func.vmap(f)(x), fullgraph=True)
    assert_near(mapped(x), torch.stack([f(one) for one in x]))
    gradient = torch.compile(torch.func.grad(lambda x: f(x).pow(3).sum()), fullgraph=True)
    assert_near(gradient(x[0]), torch.func.grad(lambda x: f(x).pow(3).sum())(x[0]))


def without_cumulative_average(net, training):
    """torch exports no momentum that depends on the counter, neither of its own modules nor of
    ours, which export as these do."""
    if training:
        net.bn2.momentum = 0.1
    return net.train(training)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(net, training, strict):
    """In torch's own operators; test_export_portable.py says more."""
    net = without_cumulative_average(net, training)
    x = torch.randn(4, 3, 8, 8)
    exported = torch.export.export(copy.deepcopy(net), (x,), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("aten.batch_norm.default") == 3
    assert not [target for target in targets if "bnorm_ext" in target]
    module = exported.module()
    assert_near(module(x), net(x))
    # In inference a graph keeps no counter.
    buffers = dict(module.named_buffers())
    expected = {k: v for k, v in net.named_buffers() if training or k in buffers}
    assert buffers.keys() == expected.keys() != set()
    for name, buffer in expected.items():
        assert_near(buffers[name], buffer)


@pytest.mark.parametrize("strict", [True, False])
def test_cumulative_average_is_exported_no_more_than_natives(strict):
    """A counter read on the host is a number that an exported graph does not know."""
    x = torch.randn(4, 3, 8, 8)
    raised = []
    for model in (Net(), bnorm_ext.convert_batchnorm(Net())):
        with pytest.raises(Exception, match="data-dependent") as caught:
            torch.export.export(model, (x,), strict=strict)
        raised.append(caught.type)
    assert raised[0] is raised[1]


def test_export_of_forward_and_backward(net):
    """The joint graph of a training step."""
    from torch.export.experimental import _export_forward_backward

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = without_cumulative_average(net, True)

        def forward(self, x):
            return self.net(x).square().sum()

    exported = torch.export.export(Loss(), (torch.randn(4, 3, 8, 8),), strict=False)
    joint = _export_forward_backward(exported)
    targets = [str(node.target) for node in joint.graph.nodes]
    assert targets.count("aten._native_batch_norm_legit_functional.default") == 3
    assert not [target for target in targets if "bnorm_ext" in target]


def test_compiled_autograd(net):
    x = torch.randn(4, 3, 8, 8)
    reference = copy.deepcopy(net)
    reference(x).square().sum().backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        net(x).square().sum().backward()
    for p, q in zip(reference.parameters(), net.parameters(), strict=True):
        assert_near(q.grad, p.grad)


def test_make_fx_sees_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x, mean, var):
        return bnorm_ext.batch_norm(x, mean, var, None, None, True)

    arguments = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    for mode in ("real", "fake", "symbolic"):
        assert "bnorm_ext.batch_norm_training" in make_fx(f, tracing_mode=mode)(*arguments).code


def test_symbolic_trace_keeps_the_function():
    def f(x, mean, var):
        return bnorm_ext.batch_norm(x, mean, var, training=True) * 2

    def fused(x, mean, var):
        options = {"num_batches_tracked": None, "act": "leaky_relu", "negative_slope": 0.3}
        return bnorm_ext.batch_norm(x, mean, var, training=True, residual=x, **options) * 2

    x = torch.randn(4, 3, 5)
    for function in (f, fused):
        traced = torch.fx.symbolic_trace(function)
        targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert targets[0] is bnorm_ext.batch_norm
        statistics = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
        assert torch.equal(traced(x, *statistics[0]), function(x, *statistics[1]))


def test_jit_trace_and_script(net):
    net.eval()
    x = torch.randn(4, 3, 8, 8)
    assert_near(torch.jit.trace(net, x)(x), net(x))
    assert_near(torch.jit.script(net)(x), net(x))


def test_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(torch.randn(4, 3, 8, 8))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert net.bn1.weight.grad.dtype == torch.float32


def test_meta_device():
    module = bnorm_ext.BatchNorm2d(3, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    assert module(x).stride() == x.stride()
    assert module.eval()(x).device.type == "meta"


class Tagged(torch.Tensor):
    """A subclass that treats torch's functions its own way."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return "handled"
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def test_tensor_subclasses():
    x = torch.randn(4, 3, 5)
    assert bnorm_ext.batch_norm(x.as_subclass(Tagged), None, None, training=True) == "handled"
    y = bnorm_ext.batch_norm(x.as_subclass(Plain), None, None, training=True)
    assert type(y) is type(F.batch_norm(x.as_subclass(Plain), None, None, training=True))
    assert torch.equal(
        y.as_subclass(torch.Tensor), bnorm_ext.batch_norm(x, None, None, None, None, True)
    )
