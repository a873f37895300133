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
from fuse_nets import assert_trains_alike, images
from torch import nn
from twins import FLOAT64, assert_same, step

import bnorm_ext
from bnorm_ext import convert_batchnorm, fuse_batchnorm_act, revert_batchnorm


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
    assert type(module) is bnorm_ext.BatchNormAct2d
    assert module.act == act
    assert list(module.children()) == []
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
    assert (module.act, module.negative_slope) == ("leaky_relu", 0.3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_remember(norm, duplicate):
    module = duplicate(convert_batchnorm(build(norm, "silu")))
    revert_batchnorm(module)
    assert type(module) is norm
    assert type(module.act) is nn.SiLU


def left_as_it_is(module, cls):
    children = dict(module.named_children())
    with pytest.warns(UserWarning, match=r"timm\.layers\.norm_act\.BatchNormAct2d: 0"):
        convert_batchnorm(nn.Sequential(module))
    assert type(module) is cls
    assert dict(module.named_children()) == children


@pytest.mark.parametrize("act", [nn.GELU, nn.PReLU, nn.Tanh])
def test_other_activations_are_left(norm, act):
    left_as_it_is(norm(3, act_layer=lambda **kwargs: act()), norm)


def test_dropout_is_left(norm):
    left_as_it_is(norm(3, drop_layer=nn.Dropout), norm)


def test_hooks_on_the_activation_are_left(norm):
    module = norm(3)
    module.act.register_forward_hook(lambda m, a, y: None)
    left_as_it_is(module, norm)


def test_further_children_are_left(norm):
    module = norm(3)
    module.more = nn.ReLU()
    left_as_it_is(module, norm)


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
    assert fused.bn1.act == "silu"
    assert type(plain.bn1) is norm
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_revert_leaves_what_was_fused_with_more(norm):
    fused, _ = fuse_batchnorm_act(Residual(norm).double())
    with pytest.warns(UserWarning, match=r"revert_batchnorm left.*BatchNormAct2d: bn2$"):
        revert_batchnorm(fused)
    assert type(fused.bn1) is norm
    assert type(fused.bn2) is bnorm_ext.BatchNormAct2d


def test_one_that_is_left_is_named_in_the_report(norm):
    model = nn.Sequential(norm(3, act_layer=nn.GELU), nn.ReLU())
    _, report = fuse_batchnorm_act(model)
    assert report.fused == []
    assert [name for name, _ in report.refused] == ["0"]
