"""What fuse_batchnorm_act does with modules whose forward a graph could not stand for."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from bnorm_ext.fuse import FusedModule
from tests.common.fuse_nets import (
    TOLERANCE,
    Around,
    ByValue,
    Inner,
    assert_same_results,
    assert_trains_alike,
    fuse_separately,
    images,
    layer,
)


class ByLength(Inner):
    def do(self, x):
        return torch.cat(list(x)).view_as(x)


class FunctionalDropout(Inner):
    def do(self, x):
        return F.dropout(x, 0.5, self.training)


class OtherResult(Inner):
    """The same operations in both modes, another of their results."""

    def do(self, x):
        y = x * 2
        return x if self.training else y


class RandomPath(Inner):
    def do(self, x):
        return x if torch.rand(()) < 0.5 else 2 * x


class RandomPathOfPython(Inner):
    def do(self, x):
        return x if random.random() < 0.5 else 2 * x


class Counts(Inner):
    calls = 0

    def do(self, x):
        self.calls += 1
        return x


class CountsAndFails(Counts):
    def do(self, x):
        x = super().do(x)
        return x if x.sum() > 0 else -x


class Remembers(Inner):
    def do(self, x):
        self.last = x
        return x


class Appends(Inner):
    def __init__(self):
        super().__init__()
        self.seen = []

    def do(self, x):
        self.seen.append(x)
        return x


class WithoutGradients(Inner):
    """One chain of it is run without gradients."""

    def forward(self, x):
        with torch.no_grad():
            y = self.stack(x)
        return self.listed[0](torch.relu(self.bn(self.conv(x))) + y)


class Autocast(Inner):
    def do(self, x):
        with torch.autocast("cpu", enabled=False):
            return x * 2


class Checkpointed(Inner):
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.listed[0](checkpoint(self.stack, x, use_reentrant=False))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class ReversesGradients(Inner):
    def do(self, x):
        return Reversed.apply(x)


class MakesTensor(Inner):
    def do(self, x):
        return x * torch.tensor([[[2.0]]], dtype=torch.float64)


UNFIT = {
    ByValue: "control flow",
    ByLength: "iterates",
    FunctionalDropout: "differs between training and evaluation",
    OtherResult: "differs between training and evaluation",
    RandomPath: "random numbers",
    RandomPathOfPython: "random numbers",
    Counts: "changes attributes",
    CountsAndFails: "control flow",
    Remembers: "changes attributes",
    Appends: "changes attributes",
    WithoutGradients: "switches gradients",
    Autocast: "the context autocast",
    Checkpointed: "checkpoints",
    ReversesGradients: "the autograd function Reversed",
    MakesTensor: "makes a tensor",
}


@pytest.mark.parametrize("cls", UNFIT)
def test_unfit_module_keeps_its_forward(cls):
    """What is around and inside it is fused; its own chain is not."""
    plain = Around(cls()).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert re.search(UNFIT[cls], report.not_traced[0][1])
    assert {name for name, *_ in report.fused} == {
        "before.1",
        "after.1",
        "inner.stack.0.1",
        "inner.listed.0.1",
    }
    assert type(fused.inner) is cls
    assert isinstance(fused, FusedModule)
    assert isinstance(fused.inner.stack, FusedModule)
    assert_same_results(fused, plain)


@pytest.mark.parametrize("cls", UNFIT)
def test_unfit_root_keeps_its_forward(cls):
    plain = cls().double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["(root)"]
    assert re.search(UNFIT[cls], report.not_traced[0][1])
    assert {name for name, *_ in report.fused} == {"stack.0.1", "listed.0.1"}
    assert type(fused).forward is cls.forward
    assert type(fused.bn) is bnorm_ext.BatchNorm2d
    assert_same_results(fused, plain)


@pytest.mark.parametrize("cls", UNFIT)
def test_tracing_leaves_no_trace(cls):
    plain = Around(cls()).double()
    plain.inner.stack.eval()
    before = {path: dict(vars(module)) for path, module in plain.named_modules()}
    states = torch.get_rng_state(), random.getstate()
    fused, _ = fuse_batchnorm_act(plain)
    assert {path: dict(vars(module)) for path, module in plain.named_modules()} == before
    assert vars(fused.inner).get("seen", []) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    modes = {path: module.training for path, module in plain.named_modules()}
    assert {path: module.training for path, module in fused.named_modules()} == modes
    assert fused.inner.__dict__.keys().isdisjoint({"last", "calls"})


def test_optional_arguments_of_the_model():
    class Optional(Around):
        def forward(self, x, mask=None):
            y = super().forward(x)
            return y if mask is None else y * mask

    plain = Optional(nn.Identity()).double()
    fused, report = fuse_separately(plain)
    assert "optional arguments (mask)" in report.not_traced[0][1]
    assert {name for name, *_ in report.fused} == {"before.1", "after.1"}
    x = images(0)
    for args in ((x,), (x, 2 * x)):
        torch.testing.assert_close(fused(*args), plain(*args), **TOLERANCE)


def test_several_unfit_modules():
    plain = nn.Sequential(*(cls() for cls in UNFIT), layer()).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == [str(i) for i in range(len(UNFIT))]
    assert len(report.fused) == 2 * len(UNFIT) + 1
    # Some forty layers with running statistics of one batch: rounding grows a million times. A
    # chain that is fused wrongly is off by as much as the values.
    assert_same_results(fused, plain, steps=2, rtol=1e-6, atol=1e-6)


def test_every_functional_dropout_is_found():
    """Modules without children of their own, many of them, at several depths."""

    class Dropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    plain = nn.Sequential(
        layer(), Dropout(), nn.Sequential(layer(), Dropout()), Around(Dropout())
    ).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["1", "2.1", "3.inner"]
    assert len(report.fused) == 4
    assert_same_results(fused, plain)


def test_buffers_are_those_of_the_day():
    """A buffer that is computed with or changed in place is in the graph, not frozen."""

    class Buffers(Around):
        def __init__(self):
            super().__init__(nn.Identity())
            self.register_buffer("scale", torch.zeros(1))

        def forward(self, x):
            self.scale.add_(1)
            return super().forward(x) * self.scale.exp()

    plain = Buffers().double()
    fused, report = fuse_separately(plain)
    assert report.not_traced == []
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])
    assert fused.scale == plain.scale == 4  # three steps and one evaluation
