"""The net that the rest of torch is tried on, in each make: native, converted, with BatchNormAct
modules, fused. All makes have the same parameters under the same names.

Float64 throughout, where two correct nets differ by rounding alone: some 10 layers of sums over at
most 100 values of magnitude below 100, so 1e-10 is 1e6 roundoffs of what is added, as in
`fuse_nets`. A missing term or factor shows in the first digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnorm_ext
from tests.common.fuse_nets import TOLERANCE
from tests.common.twins import assert_same

KINDS = ("converted", "act", "fused")
EVERY = pytest.mark.parametrize("kind", KINDS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
CHANNELS = 6


class Explicit(nn.BatchNorm2d):
    """In plain torch operations, whose derivatives of any order are autograd's own: native's are
    incomplete under torch.func (test_transforms.py)."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training or mean is None or var is None:
            var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        mean, rstd, weight, bias = (
            t.reshape(1, -1, 1, 1) for t in (mean, (var + self.eps).rsqrt(), self.weight, self.bias)
        )
        return (input - mean) * rstd * weight + bias


class Net(nn.Module):
    """A chain with ReLU, one with an addition and the same ReLU again, one with Hardswish. Not
    with SiLU, of which torch has no forward over reverse."""

    def __init__(self, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        C = CHANNELS
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3, padding=1, bias=False), norm(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C)
        self.conv3, self.bn3 = nn.Conv2d(C, C, 1, bias=False), norm(C)
        self.relu, self.hardswish = nn.ReLU(inplace=True), nn.Hardswish()
        self.fc = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        x = self.hardswish(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class ActNet(Net):
    """What `Net` computes, written with modules that add and activate."""

    def __init__(self) -> None:
        super().__init__()
        for name, act in (("bn1", "relu"), ("bn2", "relu"), ("bn3", "hardswish")):
            setattr(self, name, bnorm_ext.BatchNormAct2d(CHANNELS, act=act))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x), x)
        x = self.bn3(self.conv3(x))
        return self.fc(x.mean((2, 3)))


def fuse(model: nn.Module) -> nn.Module:
    fused, report = bnorm_ext.fuse_batchnorm_act(model)
    assert [name for name, *_ in report.fused] == ["bn1", "bn2", "bn3"], report
    return fused


def native(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """With parameters and running statistics that are not the neutral ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net().to(dtype)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-1, 1)
                    module.running_mean.uniform_(-1, 1)
                    module.running_var.uniform_(0.5, 2)
                    module.num_batches_tracked.fill_(3)
    return net


def make(kind: str, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """That make of ``model``, or of a new net, with tensors of its own."""
    model = copy.deepcopy(model) if model is not None else native(**kwargs)
    if kind == "native":
        return model
    if kind == "converted":
        return bnorm_ext.convert_batchnorm(model)
    if kind == "fused":
        return fuse(model)
    net = {"act": ActNet, "explicit": lambda: Net(Explicit)}[kind]()
    net.to(next(model.parameters()).dtype).train(model.training)
    net.load_state_dict(model.state_dict(), strict=True)
    return net


def pair(kind: str, training: bool = True, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and native."""
    return make(kind, **kwargs).train(training), make("native", **kwargs).train(training)


def images(seed: int = 0, count: int = 4, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def backward(net: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Any:
    """One forward and backward; everything that came out or changed, by name."""
    leaf = x.clone().requires_grad_()
    net.zero_grad()
    y = (call or net)(leaf)
    y.square().sum().backward()
    assert leaf.grad is not None
    seen = {"y": y.detach(), "dx": leaf.grad}
    seen |= {f"d{n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return seen | {n: b.clone() for n, b in net.named_buffers()}


def close(ours: Any, expected: Any) -> None:
    """Dictionaries of tensors, nested sequences of them, or tensors."""
    if isinstance(expected, dict):
        assert_same(ours, expected, **TOLERANCE)
    else:
        torch.testing.assert_close(ours, expected, **TOLERANCE)


def assert_kind(net: nn.Module, kind: str) -> None:
    """That the net is of that make: for what comes out of copies and files."""
    assert isinstance(net, ActNet if kind == "act" else Net)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    classes = {"act": bnorm_ext.BatchNormAct2d, "native": nn.BatchNorm2d}
    cls = classes.get(kind, bnorm_ext.BatchNorm2d)
    assert [type(m) for m in norms] == [cls] * 3
    assert hasattr(net, "unfuse") == (kind == "fused")
