"""Values of Python in a graph, and arguments of its call: numbers of numpy, tuples and dataclasses
with constructors of their own, functions without a name to be pickled by, wrong arguments."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import io
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import images


def pictures():
    return images(0).float()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.child = nn.BatchNorm2d(3), Child()

    def forward(self, x):
        return self.body(F.relu(self.bn(x)))

    def body(self, y):
        return y


class Pooling(Base):
    pass


class Child(nn.Module):
    """A layer that asks for the type of a number, so that a graph calls it."""

    def forward(self, y, factor):
        return y * (2 if type(factor) is np.float64 else 1)


def net_with(body):
    return type("Net", (Base,), {"body": body})().eval()


def fuse(net, count=1):
    fused, report = fuse_batchnorm_act(net)
    assert len(report.fused) == count, str(report)
    return fused, report


NUMBERS = {
    "division": lambda self, y: y / np.sqrt(16),
    "exponent": lambda self, y: y.pow(np.float64(2)),
    "text": lambda self, y: F.pad(y, (1, 1, 1, 1), mode=np.str_("reflect")),
    "interpolation": lambda self, y: F.interpolate(y, scale_factor=np.float64(2.0)),
    "limit": lambda self, y: y.clamp(min=np.float64(0.1)),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_of_numpy(what):
    net = net_with(NUMBERS[what])
    fused, _ = fuse(net)
    torch.testing.assert_close(fused(pictures()), net(pictures()), rtol=0, atol=0)


def test_numbers_of_numpy_whose_type_is_seen_are_not_traced():
    for body in (
        lambda self, y: (y, np.float64(2)),
        lambda self, y: self.child(y, np.float64(2)),
    ):
        net = net_with(body)
        fused, report = fuse_batchnorm_act(net)
        reasons = dict(report.not_traced)
        assert reasons["(root)"] == "its forward makes a float64, which a graph would not keep"
        found, expected = fused(pictures()), net(pictures())
        if isinstance(expected, tuple):
            assert type(found[1]) is np.float64
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_subclass_of_a_number_is_not_traced():
    kind = type("Factor", (float,), {"__repr__": lambda self: "two"})
    _, report = fuse_batchnorm_act(net_with(lambda self, y: y * kind(2.0)))
    assert "makes a Factor" in report.not_traced[0][1]


class Level(enum.IntEnum):
    TWO = 2


def test_a_member_of_an_enumeration():
    net = net_with(lambda self, y: y.flatten(Level.TWO))
    fused, _ = fuse(net)
    assert torch.equal(fused(pictures()), net(pictures()))


@dataclasses.dataclass
class Plain:
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Tensor


@dataclasses.dataclass
class Doubles:
    y: Tensor

    def __post_init__(self):
        self.y = self.y * 2


@dataclasses.dataclass
class Late:
    y: Tensor
    count: int = dataclasses.field(init=False, default=3)


class Named(typing.NamedTuple):
    y: Tensor


class NamedDoubles(Named):
    def __new__(cls, y):
        return super().__new__(cls, y * 2)


@pytest.mark.parametrize("kind", [Plain, Frozen, Doubles, Late, Named, NamedDoubles])
def test_results_with_a_class(kind):
    net = net_with(lambda self, y: kind(y))
    kept = kind in (Plain, Frozen, Named)
    fused, report = fuse_batchnorm_act(net)
    assert len(report.fused) == kept, str(report)
    if not kept:
        reason = f"its forward makes a {kind.__name__}, which a graph would not keep"
        assert report.not_traced == [("(root)", reason)]
    found = fused(pictures())
    assert type(found) is kind
    torch.testing.assert_close(found.y, net(pictures()).y)


def test_a_size_stays_a_size():
    net = net_with(lambda self, y: (y, self.bn.weight.shape))
    fused, _ = fuse_batchnorm_act(net)
    assert type(fused(pictures())[1]) is torch.Size


FUNCTIONS = {
    "max_pool1d": lambda self, y: F.max_pool1d(y.flatten(2), 2),
    "max_pool2d": lambda self, y: F.max_pool2d(y, 2),
    "max_pool3d": lambda self, y: F.max_pool3d(y[..., None], (2, 2, 1)),
    "adaptive_max_pool2d": lambda self, y: F.adaptive_max_pool2d(y, 2),
    "adaptive_max_pool3d": lambda self, y: F.adaptive_max_pool3d(y[..., None], 1),
    "torch.functional": lambda self, y: torch.broadcast_tensors(y, y)[0],
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_functions_are_pickled_by_the_name_that_finds_them(what, monkeypatch):
    net = Pooling().eval()
    monkeypatch.setattr(Pooling, "body", FUNCTIONS[what])
    fused, _ = fuse(net)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.fused_code == fused.fused_code
    torch.testing.assert_close(loaded(pictures()), net(pictures()))


class Two(Base):
    def forward(self, x, other):
        return F.relu(self.bn(x)) + other


class ByNameOnly(Base):
    def forward(self, *, x):
        return F.relu(self.bn(x))


class ByPositionOnly(Base):
    def forward(self, x, /):
        return F.relu(self.bn(x))


CALLS = {
    "too many": lambda net, x: net(x, x, x),
    "too few": lambda net, x: net(x),
    "none": lambda net, x: net(),
    "unknown name": lambda net, x: net(x, z=x),
    "twice": lambda net, x: net(x, x=x),
    "name too many": lambda net, x: net(x, x, z=x),
}


@pytest.mark.parametrize("what", CALLS)
def test_wrong_arguments_have_the_forwards_own_error(what):
    texts = []
    for net in (Two(), fuse(Two())[0]):
        with pytest.raises(TypeError) as error:
            CALLS[what](net, pictures())
        texts.append(str(error.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("cls", [ByNameOnly, ByPositionOnly])
def test_arguments_by_name_or_position_only_are_not_traced(cls):
    fused, report = fuse_batchnorm_act(cls())
    assert "by position only, or by name only" in report.not_traced[0][1]
    with pytest.raises(TypeError, match="positional"):
        fused(pictures()) if cls is ByNameOnly else fused(x=pictures())


def test_the_signature_is_the_forwards_own():
    fused, _ = fuse(Two())
    assert inspect.getfullargspec(fused.forward) == inspect.getfullargspec(Two().forward)
    assert inspect.signature(fused.forward) == inspect.signature(Two().forward)


def test_a_child_of_the_name_of_the_code():
    net = Base()
    net.fused_code = nn.Tanh()
    fused, _ = fuse_batchnorm_act(net)
    assert isinstance(fused.fused_code, nn.Tanh)


@dataclasses.dataclass(slots=True)
class Slots:
    y: Tensor


def test_a_dataclass_without_a_dictionary_and_one_as_a_value():
    fused, _ = fuse(net_with(lambda self, y: Slots(y)))
    assert type(fused(pictures())) is Slots
    net = net_with(lambda self, y: self.child(y, Plain))
    fused, _ = fuse_batchnorm_act(net)
    torch.testing.assert_close(fused(pictures()), net(pictures()))
