"""Settings of a forward that are found in unusual ways: they may change after fusing, and results
are those of the module that was not fused, after the same change."""

from __future__ import annotations

import functools
import operator
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import _dynamo, nn

from bnorm_ext import BatchNormAct2d, convert_batchnorm, fuse_batchnorm_act
from tests.common.fuse_nets import images


def pictures():
    return images(0).float()


class Base(nn.Module):
    scale = None
    options: ClassVar = {"scale": 2.0}
    static = staticmethod(F.relu)
    builtin = torch.relu

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1)
        self.relu6, self.pool = nn.ReLU6(), nn.MaxPool2d(2, 1)
        self.alpha0, self.alpha1 = 2.0, 3.0
        self.settings = types.SimpleNamespace(scale=2.0)
        self.arrays = (np.array([1.0, 2.0]), np.array([3.0, 4.0]))
        self.tensors = (torch.tensor(1.0), torch.tensor(2.0))
        self.whole = 1

    def normalised(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.body(x)

    @classmethod
    def factor(cls):
        return 2.0


def by_computed_names(self, x):
    y = self.normalised(x)
    for i in range(2):
        y = y * getattr(self, f"alpha{i}")
    return y


def change(name, value, *path):
    def apply(net):
        for part in path:
            net = getattr(net, part)
        setattr(net, name, value)

    return apply


#: What the forward does, and the change.
SETTINGS = {
    "None of the class": (
        lambda self, x: self.normalised(x) * (1.0 if self.scale is None else self.scale),
        change("scale", 5.0),
    ),
    "dictionary of the class": (
        lambda self, x: self.normalised(x) * self.options["scale"],
        change("options", {"scale": 5.0}),
    ),
    "static method": (
        lambda self, x: self.static(self.bn(self.conv(x))), change("static", F.silu)
    ),
    "function written in C": (
        lambda self, x: self.builtin(self.bn(self.conv(x))), change("builtin", torch.sigmoid)
    ),
    "class method": (
        lambda self, x: self.normalised(x) * self.factor(), change("factor", lambda: 5.0)
    ),
    "computed names": (by_computed_names, change("alpha0", 5.0)),
    "names in two parts": (
        lambda self, x: self.normalised(x) * getattr(self, "alpha" + str(1)), change("alpha1", 5.0)
    ),
    "attrgetter": (
        lambda self, x: self.normalised(x) * operator.attrgetter("settings.scale")(self),
        change("scale", 5.0, "settings"),
    ),
    "reduce": (
        lambda self, x: (
            self.normalised(x) * functools.reduce(getattr, ("settings", "scale"), self)
        ),
        change("scale", 5.0, "settings"),
    ),
    "vars": (lambda self, x: self.normalised(x) * vars(self)["alpha0"], change("alpha0", 5.0)),
    "forward of an activation": (
        lambda self, x: self.act.forward(self.bn(self.conv(x))),
        change("negative_slope", 0.7, "act"),
    ),
    "forward of a pooling": (
        lambda self, x: self.pool.forward(self.normalised(x)), change("kernel_size", 3, "pool")
    ),
    "limits of ReLU6": (
        lambda self, x: self.relu6(self.bn(self.conv(x))), change("max_val", 0.5, "relu6")
    ),
    "lower limit of ReLU6": (
        lambda self, x: self.relu6(self.bn(self.conv(x))), change("min_val", -0.5, "relu6")
    ),
    "tuple of arrays": (
        lambda self, x: self.normalised(x) * float(self.arrays[0][1]),
        change("arrays", (np.array([5.0, 6.0]), np.array([7.0, 8.0]))),
    ),
    "tuple of tensors": (
        lambda self, x: self.normalised(x) * self.tensors[0].dim() + self.tensors[0].dim(),
        change("tensors", (torch.ones(3, 1, 1), torch.tensor(2.0))),
    ),
    "type of a number": (
        lambda self, x: (self.normalised(x) > 0).int() * self.whole, change("whole", 1.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_change(what):
    body, apply = SETTINGS[what]
    net = type("Net", (Base,), {"body": body})().eval()
    fused, report = fuse_batchnorm_act(net)
    assert [name for name, *_ in report.fused] == ["bn"], str(report)
    x = pictures()
    torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-6)
    before = fused(x)
    apply(net)
    apply(fused)
    after = fused(x)
    assert after.dtype != before.dtype or not torch.equal(after, before)  # the change matters
    torch.testing.assert_close(after, net(x), rtol=1e-5, atol=1e-6)


def test_a_tuple_of_tensors_does_not_break_a_compiled_graph():
    net = type("Net", (Base,), {"body": SETTINGS["tuple of tensors"][0]})().eval()
    fused, _ = fuse_batchnorm_act(net)
    x = pictures()
    torch.compiler.reset()
    found = torch.compile(fused, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, net(x), rtol=1e-5, atol=1e-6)


def test_relu6_with_other_limits_is_no_relu6():
    act = nn.ReLU6()
    act.max_val = 0.5
    with pytest.raises(ValueError, match=r"unknown activation ReLU6 from 0\.0 to 0\.5"):
        BatchNormAct2d(3, act=act)


def test_timms_layer_with_other_limits():
    timm = pytest.importorskip("timm.layers.norm_act")
    net = timm.BatchNormAct2d(3, act_layer=nn.ReLU6).eval()
    ours = convert_batchnorm(timm.BatchNormAct2d(3, act_layer=nn.ReLU6).eval())
    net.act.max_val = ours.act.max_val = 0.5
    torch.testing.assert_close(ours(pictures()), net(pictures()))
    assert float(ours(pictures()).max()) == 0.5


ACT = nn.LeakyReLU(0.1)
HELD = {"act": nn.LeakyReLU(0.1)}


class Holding(Base):
    def __init__(self) -> None:
        super().__init__()
        self.acts = {"act": nn.LeakyReLU(0.1)}


#: Calls of a module that is no child: its settings and hooks cannot be guarded.
ELSEWHERE = {
    "global": lambda self, x: ACT(self.bn(self.conv(x))),
    "global dictionary": lambda self, x: HELD["act"](self.bn(self.conv(x))),
    "dictionary of the module": lambda self, x: self.acts["act"](self.bn(self.conv(x))),
    "forward": lambda self, x: ACT.forward(self.bn(self.conv(x))),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_modules_from_elsewhere_are_not_traced(where):
    net = type("Net", (Holding,), {"body": ELSEWHERE[where]})()
    _, report = fuse_batchnorm_act(net)
    reason = "its forward calls a module that it does not contain"
    assert report.not_traced == [("(root)", reason)]


def test_a_module_made_in_the_forward_is_traced():
    def body(self, x):
        return nn.Sequential(nn.Softmax(dim=1))(self.normalised(x))

    net = type("Net", (Base,), {"body": body})().eval()
    fused, report = fuse_batchnorm_act(net)
    assert len(report.fused) == 1, str(report)
    torch.testing.assert_close(fused(pictures()), net(pictures()))


@pytest.mark.parametrize(
    "ask",
    [
        torch.compiler.is_compiling,
        torch.compiler.is_dynamo_compiling,
        torch.get_deterministic_debug_mode,
        torch.initial_seed,
        torch.backends.cuda.flash_sdp_enabled,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        _dynamo.is_compiling,
    ],
    ids=lambda ask: ask.__name__,
)
def test_questions_about_torch_are_not_traced(ask):
    net = type("Net", (Base,), {"body": lambda self, x: self.normalised(x) * (1 + bool(ask()))})()
    _, report = fuse_batchnorm_act(net)
    assert len(report.not_traced) == 1
    assert "its forward asks" in report.not_traced[0][1]
