"""Compiled graphs may choose strides: the operators take any, and say which they give."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnorm_ext
from tests.common.versions import torch_is_before

OPS = torch.ops.bnorm_ext
SHAPE = (2, 3, 4, 5)
FORMATS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1, :1].expand(SHAPE),
}


def arguments(x_format, dy_format, training):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    given = [FORMATS[dy_format](dy), FORMATS[x_format](x), None, weight, bias]
    statistics = [None, None, mean, (var + 1e-5).rsqrt()] if training else [mean, var, None, None]
    given += [*statistics, training, 1e-5]
    return [*given, None, "relu6", 0.01, [True, True, True, True]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x_format", "dy_format"), list(itertools.product(FORMATS, FORMATS)))
def test_gradients_are_channels_last_where_x_or_dy_is(x_format, dy_format, training):
    op, given = OPS.batch_norm_backward, arguments(x_format, dy_format, training)
    native_like = op(*given)
    any_layout = op(*given, any_layout=True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
        expected = op(*fakes, any_layout=True)
    for ours, other, fake in zip(any_layout, native_like, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
        assert ours.stride() == fake.stride()
    if "channels_last" in (x_format, dy_format):
        for gradient in any_layout[:2]:
            assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_mask_ties_x_to_its_own_format():
    """Its bits lie by the strides that x had in forward."""
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    residual, dy = torch.randn(2, *SHAPE)
    _, mean, rstd, mask = OPS.batch_norm_training(
        x, residual, None, None, None, None, None, 0.1, 1e-5, "relu", 0.01, True
    )
    assert mask.numel() > 0
    given = (dy, x, *[None] * 5, mean, rstd, True, 1e-5, mask, "relu", 0.01)
    given = (*given, [True, True, False, False])
    ours, native = OPS.batch_norm_backward(*given, any_layout=True), OPS.batch_norm_backward(*given)
    for a, b in zip(ours[:2], native[:2], strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


class Net(nn.Module):
    """The compiler makes the convolutions channels_last in forward, and contiguous in backward."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=momentum)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=momentum)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=momentum)
        self.act, self.relu = nn.ReLU6(), nn.ReLU()

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(x)) + x)
        return self.bn3(self.conv3(y)).mean((2, 3))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_compiled_by_inductor(kind, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, net = Net(), Net()
    net.load_state_dict(plain.state_dict())
    if kind == "fused":
        net, _ = bnorm_ext.fuse_batchnorm_act(net)
    else:
        bnorm_ext.convert_batchnorm(net)
    counters = [CompileCounterWithBackend("inductor") for _ in range(2)]
    calls = [
        (torch.compile(owner, fullgraph=True, dynamic=dynamic, backend=counter), owner)
        for owner, counter in zip((net, plain), counters, strict=True)
    ]
    for training in (True, False):
        plain.train(training), net.train(training)
        for _ in range(3):
            x = torch.randn(4, 3, 9, 9)
            results = []
            for call, owner in calls:
                leaf = x.clone().requires_grad_()
                owner.zero_grad()
                y = call(leaf)
                y.square().mean().backward()
                grads = {n: p.grad for n, p in owner.named_parameters()}
                results.append((y, leaf.grad, grads, dict(owner.named_buffers())))
            # float32 through nine layers, both ways: some hundred roundings of 6e-8.
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    # Compiled as often as native. Older versions of torch begin again where a number of a module,
    # here eps, is an input of a dynamic graph.
    restarts = int(torch_is_before(2, 10) and dynamic and kind == "converted")
    assert counters[0].frame_count == counters[1].frame_count + restarts


PROGRAM = """
import torch, bnorm_ext
from torch import nn
seen = []
def backend(graph, inputs):
    seen.extend(str(n.target) for n in graph.graph.nodes if "batch_norm" in str(n.target))
    return graph
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.alone, self.act = bnorm_ext.BatchNorm2d(3), bnorm_ext.BatchNormAct2d(3)
        self.average = bnorm_ext.BatchNorm2d(3, momentum=None)
        self.added = bnorm_ext.BatchNormAct2d(3, act=None)
    def forward(self, x):
        return self.average(self.act(self.added(self.alone(x), x)))
torch.compile(Both(), backend=backend, fullgraph=True)(torch.randn(2, 3, 4, 4))
print(*("op" if "bnorm_ext" in name else "aten" for name in seen))
"""


@pytest.mark.parametrize(
    ("setting", "operators"),
    [
        ("", "aten aten op op"),
        ("op", "op op op op"),
        ("aten", "aten aten aten op"),
        (" ATEN ", "aten aten aten op"),
    ],
)
def test_setting(setting, operators):
    """momentum=None reads the counter on its device, which torch's operator cannot."""
    environment = {**os.environ, "BNORM_EXT_COMPILE": setting}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == operators, done.stderr


def test_unknown_setting():
    environment = {**os.environ, "BNORM_EXT_COMPILE": "cudnn"}
    done = subprocess.run(
        [sys.executable, "-c", "import bnorm_ext"], env=environment, capture_output=True, text=True
    )
    assert "BNORM_EXT_COMPILE must be aten, op or unset, not 'cudnn'" in done.stderr
