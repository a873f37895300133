"""As ``model_tools.py``, for the tools of torchvision and timm."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from tests.common.model_tools import layers_to_fuse
from tests.common.tool_table import tool

# ---- torchvision --------------------------------------------------------------------------------


@tool("torchvision: create_feature_extractor")
def _(net, x):
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(net, {"act2": "y"})(x)["y"]


@tool("torchvision: IntermediateLayerGetter")
def _(net, x):
    utils = importlib.import_module("torchvision.models._utils")
    names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2")  # it calls them in this order
    in_order = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))
    return utils.IntermediateLayerGetter(in_order, {"act2": "y"})(x)["y"]


@tool("torchvision: models.quantization's _fuse_modules")
def _(net, x):
    utils = importlib.import_module("torchvision.models.quantization.utils")
    utils._fuse_modules(net, layers_to_fuse(net), is_qat=False, inplace=True)
    return net(x)


# torchvision's FrozenBatchNorm2d is an argument of its models; no tool makes it of a batch norm.


# ---- timm ---------------------------------------------------------------------------------------


def _timm(name: str) -> Any:
    return importlib.import_module(name)


@tool("timm: freeze_batch_norm_2d")
def _(net, x):
    return _timm("timm.utils.model").freeze_batch_norm_2d(net)(x)


@tool("timm: freeze_batch_norm_2d and unfreeze_batch_norm_2d")
def _(net, x):
    utils = _timm("timm.utils.model")
    return utils.unfreeze_batch_norm_2d(utils.freeze_batch_norm_2d(net)).eval()(x)


@tool("timm: freeze")
def _(net, x):
    _timm("timm.utils.model").freeze(net)
    return net(x)


@tool("timm: convert_splitbn_model")
def _(net, x):
    return _timm("timm.layers").convert_splitbn_model(net).eval()(x)


@tool("timm: convert_sync_batchnorm")
def _(net, x):
    return _timm("timm.layers").convert_sync_batchnorm(net)(x)


@tool("timm: reparameterize_model")
def _(net, x):
    return _timm("timm.utils.model").reparameterize_model(net)(x)


@tool("timm: ModelEmaV3")
def _(net, x):
    ema = _timm("timm.utils").ModelEmaV3(net, decay=0.5)
    ema.update(net)
    return ema.module.eval()(x)


@tool("timm: ActivationStatsHook")
def _(net, x):
    utils = _timm("timm.utils.model")
    hook = utils.ActivationStatsHook(net, ["act?"], hook_fns=[utils.avg_sq_ch_mean])
    net(x)
    return torch.tensor(hook.stats["avg_sq_ch_mean"])


@tool("timm: create_feature_extractor")
def _(net, x):
    layers = _timm("timm.models._features_fx")
    return layers.create_feature_extractor(net, {"act2": "y"})(x)["y"]
