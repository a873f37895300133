"""fuse_batchnorm_act on the nets of torchvision and timm, where they are importable."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import assert_trains_alike, fuse_separately


def torchvision_net(name):
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    return getattr(models, name)(num_classes=10)


def timm_net(name):
    return pytest.importorskip("timm").create_model(name, num_classes=10)


# Counted by hand: (activation, with addition) -> batch norms.
NETS = {
    "resnet18": (torchvision_net, {("relu", False): 9, ("relu", True): 8}),
    "resnet50": (torchvision_net, {("relu", False): 33, ("relu", True): 16}),
    "mobilenet_v2": (torchvision_net, {("relu6", False): 35, ("identity", True): 10}),
    "densenet121": (torchvision_net, {("relu", False): 121}),
    "regnet_y_400mf": (torchvision_net, {("relu", False): 33, ("relu", True): 16}),
    "resnet18d": (timm_net, {("relu", False): 11, ("relu", True): 8}),
    # timm's BatchNormAct2d is fused with its activation when it is converted; those without one
    # take the additions.
    "efficientnet_b0": (timm_net, {("identity", True): 9}),
    "regnetx_002": (timm_net, {("relu", True): 13}),
}


@pytest.mark.parametrize("name", NETS)
def test_every_chain_is_fused(name):
    build, expected = NETS[name]
    model = build(name)
    fused, report = fuse_batchnorm_act(model)
    assert Counter((act, residual) for _, act, residual in report.fused) == expected
    assert report.refused == []
    assert report.not_traced == []
    norms = [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(type(m).__module__.startswith("bnorm_ext.") for m in norms)
    assert list(fused.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf", "resnet18d"])
def test_fused_net_trains_as_the_plain_one(name):
    torch.manual_seed(0)
    plain = NETS[name][0](name).double()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # both nets would have to draw the same numbers
    # Four pixels of four images at the end: statistics of four values would make a rounding grow a
    # thousand times as much (on one processor to 1e-7, past the tolerance).
    x = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64)
    fused, _ = fuse_separately(plain, x[0])
    # Up to 53 layers: roundings of 1e-16 that grow in two steps, as in fuse_nets.py.
    assert_trains_alike(fused, plain, x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["efficientnet_b0", "regnetx_002"])
def test_timm_net_with_its_own_batch_norms(name):
    torch.manual_seed(0)
    plain = timm_net(name).double().eval()
    fused, _ = fuse_separately(plain)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)
    state = bnorm_ext.convert_batchnorm(timm_net(name).double()).state_dict()
    fused.load_state_dict(state, strict=True)
