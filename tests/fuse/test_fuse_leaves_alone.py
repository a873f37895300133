"""Fusing leaves alone what is not its own: files, graphs, classes and methods of others."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from types import SimpleNamespace

import torch
from torch import fx, nn

import bnorm_ext
from bnorm_ext.fuse.fused_module import _FUSION
from tests.common.fuse_block import Block, images, reasons


def test_files_are_not_opened(tmp_path):
    class Opens(Block):
        def forward(self, x):
            with open(tmp_path / "log", "a") as file:
                file.write("called\n")
            return self.act(self.bn(self.conv(x)))

    _, report = bnorm_ext.fuse_batchnorm_act(Opens())
    assert "opens a file" in reasons(report)
    assert not (tmp_path / "log").exists()


def test_graph_modules_stay_what_they_are():
    net = fx.symbolic_trace(nn.Sequential(Block(), Block())).eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert "a graph of torch.fx" in reasons(report)
    fused.recompile()
    for other in (fused, copy.deepcopy(fused), fused.eval()):
        torch.testing.assert_close(other(images()), net(images()))


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=1.0)

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) * self.config.scale


def test_containers_in_attributes_survive_copying():
    fused, _ = bnorm_ext.fuse_batchnorm_act(Scaled().eval())
    for net in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        fusion = vars(net)[_FUSION]
        called = [None] * len(fusion.program.modules)
        assert fusion.guard.check(net, called)  # so that the graph runs
        net.config.scale = 2.0
        assert not fusion.guard.check(net, called)
        net.config.scale = 1.0


def test_classes_that_others_have_made_stay():
    fused, _ = bnorm_ext.fuse_batchnorm_act(Block().eval())
    expected = fused(images())
    made = type("Wrapped", (type(fused),), {})
    fused.__class__ = made
    bnorm_ext.revert_batchnorm(fused)
    assert type(fused) is made
    assert type(fused.bn) is nn.BatchNorm2d
    assert _FUSION not in vars(fused)
    torch.testing.assert_close(fused(images()), expected)


class HasUnfuse(Block):
    def unfuse(self):
        return "own"


def test_a_method_of_the_model_is_not_hidden():
    fused, report = bnorm_ext.fuse_batchnorm_act(HasUnfuse())
    assert report.fused
    assert fused.unfuse() == "own"
    assert type(bnorm_ext.revert_batchnorm(fused)) is HasUnfuse


class LeftBehind:
    """In a cycle of references, so that only the garbage collector ends it."""

    ended = 0

    def __init__(self) -> None:
        self.own = self

    def __del__(self) -> None:
        with open(os.devnull, "a") as file:
            print("left behind", file=file)
        LeftBehind.ended += 1


class Collects(Block):
    def forward(self, x):
        gc.collect()  # as may happen at any allocation
        return super().forward(x)


def test_finalizers_that_run_meanwhile_are_not_the_forwards():
    net, ended = Collects(), LeftBehind.ended
    gc.disable()
    try:
        LeftBehind()
        _, report = bnorm_ext.fuse_batchnorm_act(net)
    finally:
        gc.enable()
    assert LeftBehind.ended == ended + 1
    assert report.not_traced == []
    assert report.fused
