"""What a forward decides on each call stays a decision of each call: it is not traced, or the graph
is left for the module's own forward."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from tests.common.fuse_block import Block, images, reasons


class Skip(Block):
    def forward(self, x, skip):
        y = self.act(self.bn(self.conv(x)))
        return y if skip is None else y + skip


class SkipInTuple(Block):
    def forward(self, both):
        x, skip = both
        y = self.act(self.bn(self.conv(x)))
        return y if skip is None else y + skip


def test_none_in_place_of_a_tensor():
    x = images()
    for net, calls in ((Skip(), ((x, x), (x, None))), (SkipInTuple(), (((x, x),), ((x, None),)))):
        fused, report = bnorm_ext.fuse_batchnorm_act(net.eval())
        assert report.fused
        for arguments in calls:
            torch.testing.assert_close(fused(*arguments), net(*arguments))


class OwnDtype(Block):
    def forward(self, x):
        return self.act(self.bn(self.conv(x.to(self.conv.weight.dtype))))


class Frozen(Block):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * 2 if self.conv.weight.requires_grad else y


def test_dtype_and_requires_grad_of_parameters_may_change():
    fused, report = bnorm_ext.fuse_batchnorm_act(OwnDtype().eval())
    assert report.fused
    assert copy.deepcopy(fused).double()(images()).dtype == torch.float64
    net = Frozen().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    for wants in (True, False, True):
        net.conv.weight.requires_grad_(wants)
        torch.testing.assert_close(fused(images()), net(images()))


class Evaluates(Block):
    def forward(self, x):
        self.bn.eval()
        return self.act(self.bn(self.conv(x)))


class SetsTraining(Block):
    def forward(self, x):
        self.bn.training = False
        return self.act(self.bn(self.conv(x)))


class EvaluatesForAWhile(Block):
    def forward(self, x):
        self.bn.eval()
        y = self.act(self.bn(self.conv(x)))
        self.bn.train()
        return y


@pytest.mark.parametrize("cls", [Evaluates, SetsTraining, EvaluatesForAWhile])
def test_modes_that_a_forward_switches(cls):
    net = cls()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert "switches modules between training and evaluation" in reasons(report)
    before = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(fused.train()(images()), net.train()(images()))
    torch.testing.assert_close(dict(fused.state_dict()), dict(before), rtol=0, atol=0)


class Asks(Block):
    def __init__(self, question) -> None:
        super().__init__()
        self.question = question

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * 2 if self.question() else y


@pytest.mark.parametrize(
    "question",
    [
        torch.is_grad_enabled,
        torch.is_inference_mode_enabled,
        torch.is_autocast_enabled,
        torch.are_deterministic_algorithms_enabled,
    ],
    ids=lambda q: q.__name__,
)
def test_modes_that_a_forward_asks_for(question):
    net = Asks(question).eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert "asks whether gradients" in reasons(report)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(fused(images()), net(images()))


class InPlaceOperator(Block):
    def forward(self, x):
        y = self.bn(x)
        torch.ops.aten.mul_.Tensor(x, 2)
        return F.relu(y + x)


def test_operators_that_change_the_residual():
    net = InPlaceOperator().eval()
    fused, _ = bnorm_ext.fuse_batchnorm_act(net)
    torch.testing.assert_close(fused(images()), net(images()))


class SharedStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn2.running_mean, self.bn2.running_var = self.bn1.running_mean, self.bn1.running_var

    def forward(self, x):
        y, z = self.bn1(x), self.bn2(x * 3)
        return F.relu(y + x) + F.relu(z + x)


def test_batch_norms_that_share_statistics():
    net = SharedStatistics()
    fused, report = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(net))
    assert any("shares its running statistics" in reason for _, reason in report.refused)
    torch.testing.assert_close(fused(images()), net(images()))
    torch.testing.assert_close(dict(fused.state_dict()), dict(net.state_dict()))


class Adapted(nn.Module):
    """A layer with room for an adapter that is added later."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.register_parameter("adapter", None)

    def forward(self, x):
        y = self.act(self.bn(x))
        return y if self.adapter is None else y * self.adapter


def test_parameters_that_come_and_go():
    net = Adapted().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    for adapter in (nn.Parameter(torch.full((1,), 3.0)), None, nn.Parameter(torch.ones(1) * 2)):
        net.adapter = fused.adapter = adapter
        torch.testing.assert_close(fused(images()), net(images()))


class Freezes(Block):
    def forward(self, x):
        self.conv.weight.requires_grad = False
        return self.act(self.bn(self.conv(x)))


def test_a_parameter_that_a_forward_freezes():
    net = Freezes()
    _, report = bnorm_ext.fuse_batchnorm_act(net)
    assert "switches requires_grad" in reasons(report)
    assert net.conv.weight.requires_grad


class Configured(Block):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=1.0, nested={"scales": [1.0]})

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * self.config.scale * self.config.nested["scales"][0]


def test_values_inside_of_attributes():
    net = Configured().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    for held in (net.config, fused.config):
        held.scale = 3.0
    torch.testing.assert_close(fused(images()), net(images()))
    for held in (net.config, fused.config):
        held.scale, held.nested["scales"][0] = 1.0, 5.0
    torch.testing.assert_close(fused(images()), net(images()))


class Chosen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.chosen, self.queue = {"double"}, deque([1.0])

    def forward(self, x):
        y = self.act(self.bn(self.conv(x))) * self.queue[0]
        return y * 2 if "double" in self.chosen else y


def test_sets_and_queues():
    net = Chosen().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    for each in (net, fused):
        each.chosen.clear()
    torch.testing.assert_close(fused(images()), net(images()))
    for each in (net, fused):
        each.chosen.add("double")
        each.queue[0] = 3.0
    torch.testing.assert_close(fused(images()), net(images()))


class AsksByText(Block):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        if hasattr(self, "late"):
            y = y + 1
        return y * getattr(self, "scale", 1.0)


class HasMethod(Block):
    def forward(self, x):
        return self.scaled(self.act(self.bn(self.conv(x))))

    def scaled(self, y):
        return y


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (AsksByText, "scale", 3.0),
        (AsksByText, "late", True),
        (HasMethod, "scaled", lambda y: y * 3),
    ],
    ids=["getattr", "hasattr", "method"],
)
def test_attributes_that_come_later(cls, name, value):
    net = cls().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    setattr(net, name, value), setattr(fused, name, value)
    torch.testing.assert_close(fused(images()), net(images()))


class AsksForMode(Block):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * 3 if self.training and not self.bn.training else y


def test_modules_in_different_modes():
    net = AsksForMode()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    for each in (net, fused):
        each.train().bn.eval()
    torch.testing.assert_close(fused(images()), net(images()))


class Falls(Block):
    def forward(self, x):
        try:
            y = self.act(self.bn(self.conv(x)))
        except RuntimeError:
            y = x
        return y


class FallsAtAll(Block):
    def forward(self, x):
        try:
            y = self.act(self.bn(self.conv(x)))
        except:  # noqa: E722
            y = x
        return y


class Suppresses(Block):
    def forward(self, x):
        y = x
        with contextlib.suppress(RuntimeError):
            y = self.act(self.bn(self.conv(x)))
        return y


@pytest.mark.parametrize("cls", [Falls, FallsAtAll, Suppresses])
def test_exceptions_that_a_forward_handles(cls):
    net = cls().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert "handles exceptions" in reasons(report)
    x = torch.randn(2, 4, 5, 5)  # the convolution takes three channels
    torch.testing.assert_close(fused(x), net(x))


class Finally(Block):
    def forward(self, x):
        with contextlib.nullcontext():
            try:
                return self.act(self.bn(self.conv(x)))
            finally:
                del x


def test_cleaning_up_is_no_handling():
    _, report = bnorm_ext.fuse_batchnorm_act(Finally())
    assert report.not_traced == []
    assert report.fused
