"""fuse_batchnorm_act on single blocks: each way to write an activation and an addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import (
    TOLERANCE,
    assert_trains_alike,
    calls,
    fuse_separately,
    images,
    inputs,
)


class Block(nn.Module):
    """conv, batch norm, and what ``tail`` does with its output and the input."""

    def __init__(self, tail, act=None, dims=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.conv, self.bn = conv(3, 3, 3, padding=1), norm(3)
        self.act, self.tail = act, tail

    def forward(self, x):
        return self.tail(self, self.bn(self.conv(x)), x)


MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda **kwargs: nn.LeakyReLU(0.2, **kwargs),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
FUNCTIONS = {
    "F.relu": (lambda z: F.relu(z), "relu"),
    "F.relu inplace": (lambda z: F.relu(z, inplace=True), "relu"),
    "F.relu positional": (lambda z: F.relu(z, True), "relu"),
    "F.relu6": (lambda z: F.relu6(z), "relu6"),
    "F.leaky_relu default": (lambda z: F.leaky_relu(z), "leaky_relu"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.2, True), "leaky_relu"),
    "F.leaky_relu by name": (lambda z: F.leaky_relu(z, negative_slope=0.2), "leaky_relu"),
    "F.silu": (lambda z: F.silu(z, inplace=True), "silu"),
    "F.hardswish": (lambda z: F.hardswish(z), "hardswish"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu by name": (lambda z: torch.relu(input=z), "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "F.relu_": (F.relu_, "relu"),
    "relu": (lambda z: z.relu(), "relu"),
    "relu_": (lambda z: z.relu_(), "relu"),
}


def iadd(y, x):
    y += x
    return y


ADDITIONS = {
    "none": lambda y, x: y,
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "y += x": iadd,
    "torch.add": lambda y, x: torch.add(x, y),
    "torch.add by name": lambda y, x: torch.add(y, other=x, alpha=1),
    "add": lambda y, x: y.add(x),
    "add_": lambda y, x: y.add_(x),
}


def check_block(block, act, residual, shape=(4, 3, 5, 6)):
    """That the batch norm of a block is fused as said, and the block trains as before."""
    block.double()
    fused, report = fuse_separately(block)
    assert report.fused == [("bn", act, residual)]
    assert report.refused == []
    left = [node.op for node in fused.fused_graph.nodes if node.op != "get_attr"]
    assert left == ["placeholder", "call_module", "call_function", "output"]
    assert calls(fused) == 1
    assert_trains_alike(fused, block, inputs(shape))


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", MODULES)
def test_activation_modules(act, inplace, addition):
    def tail(self, y, x):
        return self.act(ADDITIONS[addition](y, x))

    block = Block(tail, MODULES[act](inplace=inplace))
    check_block(block, act, addition != "none")


@pytest.mark.parametrize("addition", ["none", "x + y"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_functions(function, addition):
    call, act = FUNCTIONS[function]
    block = Block(lambda self, y, x: call(ADDITIONS[addition](y, x)))
    check_block(block, act, addition != "none")


@pytest.mark.parametrize("addition", [name for name in ADDITIONS if name != "none"])
def test_addition_without_activation(addition):
    check_block(Block(lambda self, y, x: ADDITIONS[addition](y, x)), "identity", True)


@pytest.mark.parametrize(("dims", "shape"), [(1, (4, 3, 7)), (3, (2, 3, 4, 3, 5))])
def test_dimensions(dims, shape):
    block = Block(lambda self, y, x: F.relu(y + x), dims=dims)
    check_block(block, "relu", True, shape)


def test_the_slope_comes_with_the_activation():
    block = Block(lambda self, y, x: self.act(y), nn.LeakyReLU(0.3)).double()
    fused, _ = fuse_separately(block)
    assert_trains_alike(fused, block, inputs(), **TOLERANCE)


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        a, b = self.bn1(self.conv1(x)), self.bn2(self.conv2(x))
        a += b
        return torch.relu(a)


def test_of_two_batch_norms_the_later_takes_the_addition():
    plain = TwoNorms().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn2", "relu", True)]
    assert report.refused == []
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_if_the_later_cannot_the_earlier_takes_it():
    plain = TwoNorms().double()
    plain.bn2.register_forward_hook(lambda m, a, y: None)
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn1", "relu", True)]
    assert report.refused == [("bn2", "it has forward hooks")]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_an_activation_after_a_module_that_adds():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnorm_ext.BatchNormAct2d(3, act=None)

        def forward(self, x):
            return F.silu(self.bn(x, residual=x))

    plain = Adds().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn", "silu", True)]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_report_as_text():
    model = nn.Sequential(Block(lambda self, y, x: F.relu(y + x)), TwoNorms(), nn.SyncBatchNorm(3))
    model[1].bn2.register_forward_hook(lambda m, a, y: None)
    _, report = fuse_batchnorm_act(model)
    assert str(report).splitlines() == [
        "2 batch norms fused",
        "  0.bn: with addition and relu",
        "  1.bn1: with addition and relu",
        "2 refused",
        "  1.bn2: it has forward hooks",
        "  2: torch.nn.modules.batchnorm.SyncBatchNorm may do more than batch normalisation",
    ]
    with pytest.raises(AttributeError):
        report.fused = []
    _, report = fuse_batchnorm_act(Block(lambda self, y, x: F.relu(y)))
    assert str(report).splitlines() == ["1 batch norm fused", "  bn: with relu"]
    _, report = fuse_batchnorm_act(nn.ReLU())
    assert str(report) == "0 batch norms fused"
