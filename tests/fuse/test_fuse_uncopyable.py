"""Objects that cannot be copied, or whose copy is the object itself: what a forward changes in them
would not be noticed, so it is not traced; a model that only holds them is fused. And models that
say themselves how they are copied."""

from __future__ import annotations

import copy
import csv
import functools
import io
import multiprocessing
import re
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import images


class Meter:
    """A counter that several threads may use."""

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0

    def add(self):
        with self.lock:
            self.count += 1

    def value(self):
        return self.count


class Shared:
    """Its copies are the object itself."""

    def __init__(self):
        self.count = 0

    def __deepcopy__(self, memo):
        return self

    def add(self):
        self.count += 1

    def value(self):
        return self.count


class OfTheClass:
    count = 0

    def add(self):
        OfTheClass.count += 1

    def value(self):
        return OfTheClass.count


COUNT = [0]


def increase():
    COUNT[0] += 1


METER, SHARED, OF_THE_CLASS = Meter(), Shared(), OfTheClass()
NUMBER = multiprocessing.Value("i", 0)
REGISTRY = {"add": increase}
PARTIAL = functools.partial(increase)
LISTENERS = [increase]


def add_to_number():
    NUMBER.value += 1


class Base(nn.Module):
    meter = Meter()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shared = Shared()

    def forward(self, x):
        self.effect()
        return F.relu(self.bn(self.conv(x)))

    def effect(self):
        pass


#: What the forward does, and the count of it.
EFFECTS = {
    "lock": (lambda self: METER.add(), METER.value),
    "copy is itself": (lambda self: SHARED.add(), SHARED.value),
    "attribute whose copy is itself": (lambda self: self.shared.add(), None),
    "attribute of the class with a lock": (lambda self: self.meter.add(), Base.meter.value),
    "class of a global": (lambda self: OF_THE_CLASS.add(), OF_THE_CLASS.value),
    "functions in a dictionary": (lambda self: REGISTRY["add"](), lambda: COUNT[0]),
    "functions in a list": (lambda self: [f() for f in LISTENERS], lambda: COUNT[0]),
    "partial function": (lambda self: PARTIAL(), lambda: COUNT[0]),
    "value of several processes": (lambda self: add_to_number(), lambda: NUMBER.value),
}


@pytest.mark.parametrize("what", EFFECTS)
def test_effects_happen_once_a_call(what):
    effect, count = EFFECTS[what]
    net = type("Net", (Base,), {"effect": effect})()
    fused, report = fuse_batchnorm_act(net)
    assert len(report.not_traced) == 1, str(report)
    count = count or fused.shared.value
    before = count()
    fused(images(0).float())
    fused(images(0).float())
    assert count() == before + 2


BASE = sqlite3.connect(":memory:", check_same_thread=False)
OUTPUTS = {
    "table": (lambda self: csv.writer(io.StringIO()).writerow([1]), "writes a table"),
    "database": (lambda self: BASE.execute("select 1"), "a Connection, which cannot be copied"),
    "process": (lambda self: subprocess.run([sys.executable, "-c", ""], check=True), "processes"),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_outputs_are_not_traced(what):
    effect, words = OUTPUTS[what]
    _, report = fuse_batchnorm_act(type("Net", (Base,), {"effect": effect})())
    assert len(report.not_traced) == 1
    assert re.search(words, report.not_traced[0][1]), report


@pytest.mark.parametrize("value", [threading.Lock(), np, METER], ids=["lock", "module", "object"])
def test_a_model_that_holds_what_cannot_be_copied(value):
    net = nn.Sequential(Base(), nn.Tanh())
    net.value = net[0].value = value
    fused, report = fuse_batchnorm_act(net)
    assert fused.value is fused[0].value is net.value
    assert len(report.fused) == 1, str(report)
    assert not report.not_traced
    x = images(0).float()
    torch.testing.assert_close(fused(x), copy.deepcopy(net, {id(value): value})(x))


class Copies(nn.Module):
    """Its copies have tensors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))

    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made


def test_models_that_say_how_they_are_copied():
    for net in (Copies(), nn.Sequential(Copies(), Copies())):
        fused, report = fuse_batchnorm_act(net.eval())
        assert len(report.fused) == sum(isinstance(m, Copies) for m in net.modules())
        for mine, theirs in zip(fused.parameters(), net.parameters(), strict=True):
            assert mine is theirs
        assert not {*map(id, fused.modules())} & {*map(id, net.modules())}
        torch.testing.assert_close(fused(images(0).float()), net(images(0).float()))
