"""Blocks in which batch norm, addition and activation meet, beside those of `nets.py`, and how a
fused net is compared with the one it was made from."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnorm_ext import fuse_batchnorm_act
from bnorm_ext.fuse import FusionReport
from bnorm_ext.fuse.call import batch_norm_add_act
from tests.common.nets import NETS, conv_norm_act
from tests.common.twins import assert_same

# As for the converted nets of test_convert.py: five steps of two nets that differ by u = 1.1e-16
# relative per operation stay within a growth of 1e6 of each other.
TOLERANCE: dict[str, float] = {"rtol": 0.0, "atol": 1e-10}


class SqueezeExcitation(nn.Module):
    """A gate per channel, made of the channel's mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return torch.sigmoid(gate) * x


class RegNetBlock(nn.Module):
    """Radosavovic et al. 2020, arXiv:2003.13678: a batch norm on either side of the addition."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.proj: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.proj = nn.Sequential(conv, nn.BatchNorm2d(c_out))
        self.f = nn.Sequential(
            conv_norm_act(nn.BatchNorm2d, c_in, c_out, 1),
            conv_norm_act(nn.BatchNorm2d, c_out, c_out, 3, stride, groups=2),
            SqueezeExcitation(c_out),
            nn.Sequential(nn.Conv2d(c_out, c_out, 1, bias=False), nn.BatchNorm2d(c_out)),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class SmallRegNetY(nn.Module):
    """A stem and three blocks: 7 activations after a batch norm, 3 after an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm_act(nn.BatchNorm2d, 3, 8)
        self.trunk = nn.Sequential(
            RegNetBlock(8, 8, 1), RegNetBlock(8, 12, 2), RegNetBlock(12, 12, 1)
        )
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(self.stem(x)).mean((2, 3)))


class ResNetDBlock(nn.Module):
    """He et al. 2018, arXiv:1812.01187: the shortcut is averaged, then projected. With the
    places for regularisation that timm leaves empty by ``nn.Identity``."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1, self.drop_block = nn.BatchNorm2d(c_out), nn.Identity()
        self.act1, self.aa = nn.ReLU(inplace=True), nn.Identity()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True) if stride != 1 else nn.Identity()
            conv = nn.Conv2d(c_in, c_out, 1, bias=False)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.bn2(self.conv2(x))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class SmallResNetD(nn.Module):
    """A deep stem and three blocks: 5 activations after a batch norm, 3 after an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
        )
        self.bn1, self.act1 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            ResNetDBlock(8, 8, 1), ResNetDBlock(8, 12, 2), ResNetDBlock(12, 14, 1)
        )
        self.fc = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.stem(x)))
        return self.fc(self.layers(x).mean((2, 3)))


FUSE_NETS: dict[str, Callable[[], nn.Module]] = {
    **NETS,
    "regnet_y": SmallRegNetY,
    "resnet_d": SmallResNetD,
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FUSE_NETS[name]().double()


def images(seed: int, count: int = 4, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def fuse_separately(model: nn.Module, *args: Any) -> tuple[nn.Module, FusionReport]:
    """A fused net that shares no tensor with ``model``."""
    return fuse_batchnorm_act(copy.deepcopy(model), *args)


def assert_trains_alike(
    fused: nn.Module,
    plain: nn.Module,
    inputs: Iterable[Tensor],
    **tolerance: float,
) -> None:
    """Outputs, gradients of inputs and parameters and running statistics over steps of SGD, and
    the outputs of evaluation afterwards. ``plain`` and ``fused`` must share no tensor."""
    tolerance = tolerance or TOLERANCE
    nets = (fused, plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for x in inputs:
        seen: list[dict[str, Tensor]] = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = net(leaf.clone())  # a net may change its input in place
            y.square().mean().backward()
            assert leaf.grad is not None
            grads = {f"d{n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
            seen.append({"y": y.detach(), "dx": leaf.grad, **grads})
            optimizer.step()
        assert_same(*seen, **tolerance)
        assert_same(dict(fused.state_dict()), dict(plain.state_dict()), **tolerance)
    for net in nets:
        net.eval()
    torch.testing.assert_close(fused(x.clone()), plain(x.clone()), **tolerance)


def layer(c_in=3, c_out=3):
    """Traceable, with one chain to fuse."""
    return conv_norm_act(nn.BatchNorm2d, c_in, c_out)


class Around(nn.Module):
    """A chain, a module, a chain."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = layer(), inner, layer()

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Inner(nn.Module):
    """A chain of its own, two in children, and what a subclass does with the result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.stack, self.listed = nn.Sequential(layer()), nn.ModuleList([layer()])

    def forward(self, x):
        return self.do(self.listed[0](self.stack(torch.relu(self.bn(self.conv(x))))))

    def do(self, x):
        return x


class ByValue(Inner):
    def do(self, x):
        return x if x.sum() > 0 else -x


def assert_same_results(fused, plain, steps=3, **tolerance):
    """As `assert_trains_alike`, with the same random numbers for both."""
    tolerance = tolerance or TOLERANCE
    for seed in range(steps):
        for training in (True, False):
            fused.train(training), plain.train(training)
            results = []
            for net in (fused, plain):
                torch.manual_seed(seed)
                random.seed(seed)
                x = images(seed).requires_grad_()
                y = net(x)
                y.square().sum().backward()
                results.append((y, x.grad))
            torch.testing.assert_close(*results, **tolerance)
    assert list(fused.state_dict()) == list(plain.state_dict())


class Net(nn.Module):
    """A convolution, then what ``body`` says."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.bias = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("offset", torch.ones(1))
        self.body = body

    def forward(self, x):
        return self.body(self, self.conv(x), x)


def inputs(shape=(4, 3, 5, 6)):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def check(body, fused, refused, prepare=lambda net: None, example=False):
    """That exactly ``fused`` is fused, exactly ``refused`` refused, for reasons with those words
    in them, and that the net trains as before."""
    plain = Net(body).double()
    prepare(plain)
    given = [torch.empty(2, 3, 5, 6, dtype=torch.float64)] if example else []
    net, report = fuse_separately(plain, *given)
    assert [name for name, *_ in report.fused] == fused
    assert [name for name, _ in report.refused] == [name for name, _ in refused]
    for (_, reason), (_, words) in zip(report.refused, refused, strict=True):
        assert words in reason
    assert_trains_alike(net, plain, inputs())
    return net


def calls(fused):
    """The fused calls in its graph."""
    return sum(node.target is batch_norm_add_act for node in fused.fused_graph.nodes)
