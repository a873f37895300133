"""Conversion of timm's BatchNormAct2d, with timm where it is importable and with a stand-in."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext import convert_batchnorm, fuse_batchnorm_act, revert_batchnorm
from tests.common.fuse_nets import assert_trains_alike, images
from tests.common.twins import FLOAT64, assert_same, step


class StandIn(nn.BatchNorm2d):
    """What timm's class is made of, under its name."""

    __module__ = "timm.layers.norm_act"
    __qualname__ = "BatchNormAct2d"

    def __init__(self, num_features, apply_act=True, act_layer=nn.ReLU, drop_layer=None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer() if apply_act else nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.fixture(params=["timm", "stand-in"])
def norm(request, monkeypatch):
    """The class, as ``timm.layers.norm_act.BatchNormAct2d``."""
    if request.param == "timm":
        return pytest.importorskip("timm.layers.norm_act").BatchNormAct2d
    try:
        importlib.import_module("timm")
    except ImportError:
        for name in ("timm", "timm.layers", "timm.layers.norm_act"):  # for pickle
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["timm.layers.norm_act"].BatchNormAct2d = StandIn
    else:
        monkeypatch.setattr("timm.layers.norm_act.BatchNormAct2d", StandIn)
    return StandIn


@pytest.fixture(autouse=True)
def _no_stray_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


ACTS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "identity": None,
}


def build(norm, act, channels=3):
    kwargs = {"apply_act": False} if ACTS[act] is None else {"act_layer": ACTS[act]}
    return norm(channels, **kwargs).double()


@pytest.mark.parametrize("act", ACTS)
def test_becomes_ours_and_back(norm, act):
    module = build(norm, act)
    native = copy.deepcopy(module)
    keys, text = list(module.state_dict()), repr(module)
    children, weight = dict(module.named_children()), module.weight
    assert convert_batchnorm(module) is module
    assert isinstance(module, norm)
    assert type(module) is bnorm_ext.modules_timm.BatchNormAct2d
    assert module.activation()[0] == act
    assert dict(module.named_children()) == children
    assert module.weight is weight
    assert list(module.state_dict()) == keys
    x, dy = images(0), images(1)
    for training in (True, False):
        module.train(training), native.train(training)
        assert_same(step(module, x, dy), step(native, x, dy), **FLOAT64)
    assert revert_batchnorm(module) is module
    assert type(module) is norm
    assert repr(module) == text
    assert dict(module.named_children()) == children
    assert not any(child.training for child in module.children())
    assert list(module.state_dict()) == keys
    assert vars(module).keys() == vars(native).keys()
    torch.testing.assert_close(module(x), native(x), **FLOAT64)


def test_the_slope_comes_with_it(norm):
    module = norm(3, act_layer=lambda **kwargs: nn.LeakyReLU(0.3))
    convert_batchnorm(module)
    assert module.activation() == ("leaky_relu", 0.3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_remember(norm, duplicate):
    module = duplicate(convert_batchnorm(build(norm, "silu")))
    revert_batchnorm(module)
    assert type(module) is norm
    assert type(module.act) is nn.SiLU


def hooked(norm):
    module = norm(3)
    module.act.register_forward_hook(lambda m, a, y: 2 * y)
    return module


def hooked_drop(norm):
    module = norm(3)
    module.drop.register_forward_hook(lambda m, a, y: 2 * y)
    return module


def with_another_child(norm):
    module = norm(3)
    module.more = nn.ReLU()
    return module


OTHERS = {
    "gelu": lambda norm: norm(3, act_layer=lambda **kwargs: nn.GELU()),
    "prelu": lambda norm: norm(3, act_layer=lambda **kwargs: nn.PReLU()),
    "tanh": lambda norm: norm(3, act_layer=lambda **kwargs: nn.Tanh()),
    "dropout": lambda norm: norm(3, drop_layer=nn.Dropout),
    "hooked": hooked,
    "hooked drop": hooked_drop,
    "child": with_another_child,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_one_call_cannot_do_is_done_by_the_children(norm, other):
    module = OTHERS[other](norm).double()
    native = copy.deepcopy(module)
    convert_batchnorm(module)
    assert isinstance(module, norm)
    for training in (True, False):
        module.train(training), native.train(training)
        results = []
        for net in (module, native):
            torch.manual_seed(0)
            results.append(step(net, images(0), images(1)))
        assert_same(*results, **FLOAT64)


def test_children_replaced_after_converting(norm):
    module = norm(3).double()
    native = copy.deepcopy(module)
    convert_batchnorm(module)
    for net in (module, native):
        net.act, net.drop = nn.Hardtanh(), nn.LeakyReLU(0.5)
    assert_same(step(module, images(0), images(1)), step(native, images(0), images(1)), **FLOAT64)


def test_subclasses_and_other_classes_of_that_name_are_left(norm):
    class BatchNormAct2d(norm):
        pass

    module = nn.Sequential(BatchNormAct2d(3))
    with pytest.warns(UserWarning, match="BatchNormAct2d: 0"):
        convert_batchnorm(module)
    assert type(module[0]) is BatchNormAct2d


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), build(norm, "silu")
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), build(norm, "identity")
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def test_fused_with_addition_and_activation(norm):
    plain = Residual(norm).double()
    fused, report = fuse_batchnorm_act(copy.deepcopy(plain))
    assert report.fused == [("bn2", "leaky_relu", True)]
    assert report.refused == []
    assert type(fused.bn1.act) is nn.SiLU
    assert type(plain.bn1) is norm
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_reverted_after_fusing(norm):
    plain = Residual(norm).double()
    fused, _ = fuse_batchnorm_act(copy.deepcopy(plain))
    revert_batchnorm(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    assert_trains_alike(fused, plain, [images(0)])


def test_one_with_another_activation_is_not_fused(norm):
    model = nn.Sequential(norm(3, act_layer=nn.GELU), nn.ReLU())
    _, report = fuse_batchnorm_act(model)
    assert report.fused == []
