"""Changes of a fused module, after fusing, of what its forward reads without calling it: other
modules, what a setting holds, shapes of tensors. Results are those of the module that was not
fused, after the same change."""

from __future__ import annotations

import argparse
import copy
import enum
import functools
import pickle
import types
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from tests.common.fuse_nets import images


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


class AttrDict(dict):
    """Options by name; asked for any other name it raises KeyError."""

    __getattr__ = dict.__getitem__


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def scaled(self, y):
        return y * self.factor


def doubled(y):
    return y * 2


def negative(y):
    return -y


def switched(y):
    return y * 2 if switched.on else y


switched.on = True
OPTIONS = argparse.Namespace(factor=2.0)
FLAGS = {"double"}
RECENT = deque([2.0])
ATTRIBUTES = AttrDict(factor=2.0)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)
        self.extra, self.heads, self.head = nn.Identity(), nn.ModuleList(), Head()
        self.register_module("post", None)
        self.project = nn.Conv2d(3, 3, 1)
        self.register_buffer("bank", torch.empty(0, 3))
        self.queries = nn.Parameter(torch.ones(2, 3))
        self.steps = {"one": doubled, "two": functools.partial(torch.clamp, max=0.5)}
        self.settings = types.SimpleNamespace(
            dtype=torch.float64, mode=Mode.ONE, factor=np.float32(2), kind=nn.ReLU,
            net=types.SimpleNamespace(head=types.SimpleNamespace(on=True)),
        )  # fmt: skip

    def normalised(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward(self, x):
        return self.after(self.normalised(x))


def net_with(after):
    return type("Net", (Base,), {"after": after})


def all_heads(self, y):
    for head in self.heads:
        y = head(y)
    return y


def changed(name, value, *path):
    def change(net):
        for part in path:
            net = getattr(net, part)
        setattr(net, name, value() if isinstance(value, type) else value)

    return change


#: What the forward does with the batch norm's output, and the change.
READS = {
    "class of a child": (
        lambda self, y: y if isinstance(self.extra, nn.Identity) else self.extra(y),
        changed("extra", nn.Tanh),
    ),
    "child that was None": (
        lambda self, y: y if self.post is None else self.post(y),
        changed("post", nn.Tanh),
    ),
    "child that is None": (
        lambda self, y: y if self.project is None else self.project(y),
        changed("project", None),
    ),
    "empty list of modules": (all_heads, lambda net: net.heads.append(nn.Tanh())),
    "attribute of an activation": (
        lambda self, y: F.leaky_relu(y, self.act.negative_slope),
        changed("negative_slope", 0.9, "act"),
    ),
    "attribute of a convolution": (
        lambda self, y: y * (2 if self.conv.padding == (0, 0) else 1),
        changed("padding", (1, 1), "conv"),
    ),
    "bias of a convolution": (
        lambda self, y: y * (2 if self.conv.bias is None else 1),
        changed("bias", None, "conv"),
    ),
    "forward of a child": (lambda self, y: self.extra.forward(y), changed("extra", nn.Tanh)),
    "method of a child": (lambda self, y: self.head.scaled(y), changed("factor", 5.0, "head")),
    "function in a dictionary": (
        lambda self, y: self.steps["one"](y),
        lambda net: net.steps.update(one=negative),
    ),
    "partial function": (
        lambda self, y: self.steps["two"](y),
        lambda net: net.steps.update(two=functools.partial(torch.clamp, max=0.1)),
    ),
    "dtype": (
        lambda self, y: y.to(self.settings.dtype),
        changed("dtype", torch.float16, "settings"),
    ),
    "number of numpy": (
        lambda self, y: y * float(self.settings.factor),
        changed("factor", np.float32(3), "settings"),
    ),
    "enumeration": (
        lambda self, y: y * self.settings.mode.value,
        changed("mode", Mode.TWO, "settings"),
    ),
    "class in a setting": (
        lambda self, y: y * (2 if self.settings.kind == nn.ReLU else 1),
        lambda net: setattr(net.settings, "kind", nn.SiLU),
    ),
    "deep setting": (
        lambda self, y: y * (2 if self.settings.net.head.on else 1),
        changed("on", False, "settings", "net", "head"),
    ),
    "number of elements of a buffer": (
        lambda self, y: y + (self.bank.mean() if self.bank.numel() else 0),
        changed("bank", torch.ones(2, 3)),
    ),
    "dtype of a buffer": (
        lambda self, y: y.to(self.bank.dtype),
        lambda net: setattr(net, "bank", net.bank.half()),
    ),
    "shape of a parameter": (
        lambda self, y: y * self.queries.shape[0],
        changed("queries", nn.Parameter(torch.ones(5, 3))),
    ),
    "length of a parameter": (
        lambda self, y: y * len(self.queries),
        changed("queries", nn.Parameter(torch.ones(5, 3))),
    ),
}


def pair(net):
    """The net and its fused copy, without common tensors."""
    fused, report = bnorm_ext.fuse_batchnorm_act(net.eval())
    assert [name for name, *_ in report.fused] == ["bn"], str(report)
    return copy.deepcopy(net), copy.deepcopy(fused)


def assert_alike(net, fused, x):
    expected, found = net(x), fused(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def would_run_its_graph(fused):
    fusion = fused._bnorm_ext_fusion
    return fusion.guard.check(fused, [None] * len(fusion.program.modules))


@pytest.mark.parametrize("what", READS)
def test_what_is_read_without_a_call(what):
    after, change = READS[what]
    net, fused = pair(net_with(after)())
    x = images(0).float()
    before = net(x)
    assert would_run_its_graph(fused)
    assert_alike(net, fused, x)
    change(net), change(fused)
    assert not torch.equal(net(x), before) or net(x).dtype is not before.dtype
    assert_alike(net, fused, x)


@pytest.mark.parametrize("name", ["act", "conv", "bn"])
def test_a_called_child_set_to_none(name):
    net, fused = pair(net_with(lambda self, y: y)())
    changed(name, None)(net), changed(name, None)(fused)
    outcomes = []
    for module in (net, fused):
        with pytest.raises(TypeError) as caught:
            module(images(0).float())
        outcomes.append(str(caught.value))
    assert outcomes[0] == outcomes[1]


def test_a_replaced_activation_does_not_end_fusing():
    """Where the forward only calls it: no more is guarded than what the graph stands for."""
    net, fused = pair(net_with(lambda self, y: y * 1)())
    x = images(0).float()
    changed("act", nn.SiLU)(net), changed("act", nn.SiLU)(fused)
    assert_alike(net, fused, x)
    assert would_run_its_graph(fused)


OUTSIDE = {
    "options": (lambda self, y: y * OPTIONS.factor, lambda: setattr(OPTIONS, "factor", 3.0)),
    "set": (lambda self, y: y * (2 if "double" in FLAGS else 1), FLAGS.clear),
    "deque": (lambda self, y: y * RECENT[-1], lambda: RECENT.append(3.0)),
    "attribute of a function": (
        lambda self, y: switched(y),
        lambda: setattr(switched, "on", False),
    ),
    "dictionary with attributes": (
        lambda self, y: y * ATTRIBUTES.factor,
        lambda: ATTRIBUTES.update(factor=3.0),
    ),
}


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_objects_outside(what, compiled):
    after, change = OUTSIDE[what]
    kept = vars(OPTIONS).copy(), set(FLAGS), list(RECENT), dict(ATTRIBUTES)
    net, fused = pair(net_with(after)())
    if compiled:
        torch.compiler.reset()
        # The last one breaks the graph of the net itself.
        whole = what != "dictionary with attributes"
        fused = torch.compile(fused, backend="eager", fullgraph=whole)
    x = images(0).float()
    try:
        assert_alike(net, fused, x)
        before = net(x)
        change()
        assert not torch.equal(net(x), before)
        assert_alike(net, fused, x)
    finally:
        vars(OPTIONS).update(kept[0]), FLAGS.update(kept[1]), ATTRIBUTES.update(kept[3])
        RECENT.clear(), RECENT.extend(kept[2])
        switched.on = True


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_option_that_is_added(monkeypatch, compiled):
    if compiled and torch.__version__ < "2.12":
        pytest.skip("its Dynamo cannot list the attributes of an object")
    net, fused = pair(net_with(lambda self, y: y * getattr(OPTIONS, "added", 1.0))())
    monkeypatch.setattr(OPTIONS, "added", 3.0, raising=False)
    assert not would_run_its_graph(fused)
    torch.compiler.reset()
    module = torch.compile(fused, backend="eager", fullgraph=True) if compiled else fused
    assert_alike(net, module, images(0).float())


def test_a_method_that_super_finds(monkeypatch):
    class Derived(Base):
        def forward(self, x):
            return super().forward(x) + 1

        def after(self, y):
            return y

    net, fused = pair(Derived())
    x = images(0).float()
    monkeypatch.setattr(Base, "forward", lambda self, x: torch.tanh(self.normalised(x)))
    assert_alike(net, fused, x)


def test_settings_compile_and_pickle():
    """The guard is traced by the compiler, without a graph break, and pickled."""
    net = ReadsSettings()
    if torch.__version__ < "2.10":
        del net.settings.factor  # its Dynamo has a tensor in the place of a number of numpy
    net, fused = pair(net)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = images(0).float()
    assert_alike(net, compiled, x)
    changed("on", False, "settings", "net", "head")(net)
    changed("on", False, "settings", "net", "head")(fused)
    assert_alike(net, compiled, x)
    net, fused = pair(ReadsSettings())
    fused = pickle.loads(pickle.dumps(fused))
    assert would_run_its_graph(fused)
    assert_alike(net, fused, x)
    changed("mode", Mode.TWO, "settings")(net), changed("mode", Mode.TWO, "settings")(fused)
    assert_alike(net, fused, x)


class ReadsSettings(Base):
    def after(self, y):
        y = self.steps["one"](y) * (2 if self.settings.net.head.on else 1)
        return y * (2 if self.settings.mode == Mode.ONE else 1) * self.queries.shape[0]
