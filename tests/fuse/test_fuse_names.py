"""Functions, classes and constants that a forward reads from outside may be replaced after fusing;
what tracing would freeze and nothing can compare is not traced."""

from __future__ import annotations

import contextvars
import copy
import datetime
import os
import pickle
import sys
import time
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bnorm_ext.fuse.fused_module import _FUSION
from tests.common.fuse_nets import Around, Inner, images

SCALE = 1.0
CONFIG = {"scale": 1.0, "more": [1.0]}
SETTINGS = types.SimpleNamespace(scale=1.0)
LIBRARY = types.ModuleType("bnorm_ext_library_of_a_test")
LIBRARY.scaled = lambda y: y
sys.modules[LIBRARY.__name__] = LIBRARY


class Constants:
    scale = 1.0

    @classmethod
    def scaled(cls, y):
        return y * cls.scale

    @staticmethod
    def shifted(y):
        return y + 1


def helper(y):
    return further(y)


def further(y):
    return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.act(self.bn(self.conv(x))) * Constants.scale
        y = Constants.shifted(Constants.scaled(y)) * CONFIG["scale"] * SETTINGS.scale
        return self.after(helper(LIBRARY.scaled(F.relu(y) * SCALE * CONFIG["more"][0])))

    def after(self, y):
        return torch.relu(y)


def other(self, x):
    return self.conv(x) * 3


def twice(y, *args, **kwargs):
    return y * 2


HERE = __name__
REPLACED = [
    ("constant", f"{HERE}.SCALE", 3.0),
    ("function", f"{HERE}.helper", twice),
    ("function of a function", f"{HERE}.further", twice),
    ("module", f"{HERE}.F", types.SimpleNamespace(relu=twice)),
    ("function of torch", "torch.nn.functional.relu", twice),
    ("builtin of torch", "torch.relu", twice),
    ("function of a module", f"{HERE}.LIBRARY.scaled", twice),
    ("class", f"{HERE}.Constants", types.SimpleNamespace(scale=2.0, scaled=twice, shifted=twice)),
    ("class attribute", f"{HERE}.Constants.scale", 3.0),
    ("class method", f"{HERE}.Constants.scaled", twice),
    ("static method", f"{HERE}.Constants.shifted", staticmethod(twice)),
    ("method", f"{HERE}.Block.after", lambda self, y: y * 2),
    ("forward", f"{HERE}.Block.forward", other),
    ("forward of an activation", "torch.nn.ReLU.forward", lambda self, y: y * 2),
    ("dictionary", f"{HERE}.CONFIG", {"scale": 2.0, "more": [3.0]}),
    ("namespace", f"{HERE}.SETTINGS", types.SimpleNamespace(scale=3.0)),
]


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "copied", "pickled"],
)
@pytest.mark.parametrize(
    ("name", "value"), [row[1:] for row in REPLACED], ids=[row[0] for row in REPLACED]
)
def test_replaced_after_fusing(name, value, duplicate, monkeypatch):
    net = nn.Sequential(Block(), Block()).eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert len(report.fused) == 2
    fused = duplicate(fused)
    assert graph_runs(fused)
    before = net(images(0).float())
    monkeypatch.setattr(name, value)
    torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))
    assert not torch.equal(net(images(0).float()), before)  # so that it would show


def graph_runs(fused):
    fusion = vars(fused)[_FUSION]
    return fusion.guard.check(fused, [None] * len(fusion.program.modules))


def test_forward_of_the_root_replaced(monkeypatch):
    net = Block().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    monkeypatch.setattr(Block, "forward", other)
    torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))


def test_changed_inside():
    net = Block().eval()
    fused, _ = bnorm_ext.fuse_batchnorm_act(net)
    for held, key in ((CONFIG, "scale"), (CONFIG["more"], 0), (vars(SETTINGS), "scale")):
        before = held[key]
        held[key] = 4.0
        try:
            assert not graph_runs(fused)
            torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))
        finally:
            held[key] = before
        assert graph_runs(fused)


def test_variables_of_enclosing_functions():
    def make():
        scale, scaled = 1.0, twice

        def set_(to, function):
            nonlocal scale, scaled
            scale, scaled = to, function

        class Enclosed(Block):
            def forward(self, x):
                return scaled(self.act(self.bn(self.conv(x)))) * scale

        return Enclosed().eval(), set_

    (net, set_), (_, set_other) = make(), make()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    set_other(7.0, torch.tanh)
    assert graph_runs(fused)
    for to, function in ((3.0, twice), (3.0, torch.tanh)):
        set_(to, function)
        torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))


CODE = """
import torch.nn.functional as F

SCALE = 1.0

def scaled(y):
    return y * SCALE

class Made(Block):
    def forward(self, x):
        return scaled(F.relu(self.bn(self.conv(x))))
"""


def test_code_that_was_run_by_exec():
    scope = {"Block": Block, "__name__": "made"}
    exec(CODE, scope)
    net = scope["Made"]().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    assert graph_runs(fused)
    x = images(0).float()
    torch.testing.assert_close(fused(x), net(x))
    for name, value in (("SCALE", 3.0), ("scaled", twice)):
        scope[name] = value
        torch.testing.assert_close(fused(x), net(x))


class ImportsItself(Block):
    def forward(self, x):
        import torch.nn.functional as functional
        from torch import nn as nets

        return nets.functional.softsign(functional.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("name", ["relu", "softsign"])
def test_what_a_forward_imports(name, monkeypatch):
    net = ImportsItself().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.fused
    monkeypatch.setattr(F, name, twice)
    torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))


class Compiled(Block):
    def forward(self, x):
        return helper(F.relu(self.bn(self.conv(x)))) * CONFIG["scale"] * Constants.scale


def test_compiled(monkeypatch):
    """Dynamo sees through the comparison."""
    fused, report = bnorm_ext.fuse_batchnorm_act(Compiled().eval())
    assert report.fused
    x = images(0).float()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fused(x))
    monkeypatch.setattr(f"{HERE}.helper", twice)
    torch.testing.assert_close(compiled(x), fused(x))


def test_compiled_with_variables_of_an_enclosing_function():
    scale = 1.0

    class Enclosed(Block):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x))) * scale

    fused, report = bnorm_ext.fuse_batchnorm_act(Enclosed().eval())
    assert report.fused
    x = images(0).float()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fused(x))
    scale = 3.0
    torch.testing.assert_close(compiled(x), fused(x))


def test_an_activation_that_was_replaced_before_fusing(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, y: y * 2)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert report.refused == [("1", "the forward of ReLU was replaced")]
    torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))


VARIABLE = contextvars.ContextVar("variable", default=1.0)
ASKS = {
    "os.environ": (lambda: float(os.environ.get("HOME_OF_NONE", 1)), "environment variables"),
    "os.environ[]": (lambda: len(os.environ["PATH"]), "environment variables"),
    "os.getenv": (lambda: float(os.getenv("HOME_OF_NONE", "1")), "environment variables"),
    "in": (lambda: 1.0 + ("HOME_OF_NONE" in os.environ), "environment variables"),
    "ContextVar": (lambda: VARIABLE.get(), "a context variable"),
    "time": (lambda: 1 + time.time() * 0, "the clock"),
    "perf_counter": (lambda: 1 + time.perf_counter() * 0, "the clock"),
    "datetime": (lambda: datetime.datetime.now().year, "the clock"),
    "default dtype": (lambda: torch.finfo(torch.get_default_dtype()).bits, "default dtype"),
    "processes": (lambda: 1 + torch.distributed.is_initialized(), "its processes"),
    "warning": (lambda: warnings.warn("x", stacklevel=1) or 1.0, "warns"),
}


@pytest.mark.parametrize("name", ASKS)
def test_what_nothing_can_compare_is_not_traced(name):
    ask, words = ASKS[name]

    class Asks(Inner):
        def do(self, x):
            return x * ask()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = bnorm_ext.fuse_batchnorm_act(Around(Asks()))
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert words in report.not_traced[0][1]
