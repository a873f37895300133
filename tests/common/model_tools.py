"""Tools of torch, torchvision and timm that meet batch norms: each one applied to a net, and what
the result then computes. `test_tools.py` holds the table of what comes of it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx
from torch.nn.utils import fusion, parametrizations, parametrize, prune

Tool = Callable[[nn.Module, Tensor], Tensor]
TOOLS: dict[str, Tool] = {}


def tool(name: str) -> Callable[[Tool], Tool]:
    def register(function: Tool) -> Tool:
        TOOLS[name] = function
        return function

    return register


# ---- torch: batch norms become others, or go into the layer before ------------------------------


@tool("SyncBatchNorm.convert_sync_batchnorm")
def _(net, x):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)(x)


@tool("fuse_conv_bn_eval")
def _(net, x):
    net.conv1, net.bn1 = fusion.fuse_conv_bn_eval(net.conv1, net.bn1), nn.Identity()
    return net(x)


@tool("fuse_conv_bn_eval, transposed")
def _(net, x):
    conv = nn.ConvTranspose2d(3, 6, 1, bias=False).eval()
    conv.weight.data.fill_(0.5)
    folded = fusion.fuse_conv_bn_eval(conv, net.bn1, transpose=True)
    return net.act1(folded(x))


@tool("fuse_linear_bn_eval")
def _(net, x):
    linear = nn.Linear(3, 6).eval()
    linear.weight.data.fill_(0.5)
    linear.bias.data.zero_()
    return net.act1(fusion.fuse_linear_bn_eval(linear, net.bn1)(x.mean((2, 3))))


@tool("fx.experimental.optimization.fuse")
def _(net, x):
    from torch.fx.experimental import optimization

    return optimization.fuse(net)(x)


@tool("fx.experimental.optimization.optimize_for_inference")
def _(net, x):
    from torch.fx.experimental import optimization

    return optimization.optimize_for_inference(net)(x)


@tool("utils.mkldnn.to_mkldnn")
def _(net, x):
    from torch.utils.mkldnn import to_mkldnn

    return to_mkldnn(net)(x.to_mkldnn()).to_dense()


@tool("func.replace_all_batch_norm_modules_")
def _(net, x):
    return torch.func.replace_all_batch_norm_modules_(net)(x)


@tool("swa_utils.update_bn")
def _(net, x):
    torch.optim.swa_utils.update_bn([x, x + 1], net)
    return net.eval()(x)


@tool("swa_utils.AveragedModel")
def _(net, x):
    return torch.optim.swa_utils.AveragedModel(net, use_buffers=True).eval()(x)


# ---- torch: quantisation ------------------------------------------------------------------------


def _groups(net: nn.Module) -> list[list[str]]:
    """Layers to fuse; without activation where the batch norm has it."""
    if isinstance(net.act1, nn.Identity):
        return [["conv1", "bn1"], ["conv2", "bn2"]]
    return [["conv1", "bn1", "act1"], ["conv2", "bn2", "act2"]]


@tool("ao.quantization.fuse_modules")
def _(net, x):
    return ao.fuse_modules(net, _groups(net))(x)


@tool("ao.quantization.fuse_modules_qat")
def _(net, x):
    return ao.fuse_modules_qat(net.train(), _groups(net)).eval()(x)


@tool("ao.quantization.prepare and convert")
def _(net, x):
    net = ao.QuantWrapper(net)
    net.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(net)
    prepared(x)
    return ao.convert(prepared)(x)


@tool("ao.quantization.prepare_qat")
def _(net, x):
    net.qconfig = ao.get_default_qat_qconfig("x86")
    return ao.prepare_qat(net.train()).eval()(x)


def _fx(net, x, training):
    mapping = ao.get_default_qat_qconfig_mapping() if training else ao.get_default_qconfig_mapping()
    prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
    prepared = prepare(net.train(training), mapping, (x,)).eval()
    prepared(x)
    return quantize_fx.convert_fx(prepared)(x)


TOOLS["ao.quantization.prepare_fx and convert_fx"] = lambda net, x: _fx(net, x, False)
TOOLS["ao.quantization.prepare_qat_fx and convert_fx"] = lambda net, x: _fx(net, x, True)


@tool("ao.quantization.fuse_fx")
def _(net, x):
    return quantize_fx.fuse_fx(net)(x)


@tool("ao.nn.quantized.BatchNorm2d.from_float")
def _(net, x):
    from torch.ao.nn.quantized import BatchNorm2d

    z = net.conv1(x)
    net.bn1.activation_post_process = ao.default_observer()
    net.bn1.activation_post_process(net.bn1(z))
    q = torch.quantize_per_tensor(z, 0.05, 64, torch.quint8)
    return net.act1(BatchNorm2d.from_float(net.bn1)(q).dequantize())


# ---- torch: what wraps, traces or compiles ------------------------------------------------------


@tool("parametrize.register_parametrization")
def _(net, x):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(net.bn1, "weight", Twice())
    return net(x)


@tool("parametrizations.spectral_norm")
def _(net, x):
    parametrizations.spectral_norm(net.bn1, "weight")
    return net(x)


@tool("jit.trace")
def _(net, x):
    return torch.jit.trace(net, x)(x)


@tool("jit.script")
def _(net, x):
    return torch.jit.script(net)(x)


@tool("jit.freeze")
def _(net, x):
    return torch.jit.freeze(torch.jit.script(net))(x)


@tool("jit.optimize_for_inference")
def _(net, x):
    return torch.jit.optimize_for_inference(torch.jit.script(net))(x)


@tool("fx.symbolic_trace")
def _(net, x):
    return torch.fx.symbolic_trace(net)(x)


@tool("nn.utils.prune")
def _(net, x):
    prune.l1_unstructured(net.bn1, "weight", 2)
    return net(x)


# ---- torchvision --------------------------------------------------------------------------------


@tool("torchvision: create_feature_extractor")
def _(net, x):
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(net, {"act2": "y"})(x)["y"]


@tool("torchvision: models.quantization's _fuse_modules")
def _(net, x):
    utils = importlib.import_module("torchvision.models.quantization.utils")
    utils._fuse_modules(net, _groups(net), is_qat=False, inplace=True)
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


@tool("timm: create_feature_extractor")
def _(net, x):
    layers = _timm("timm.models._features_fx")
    return layers.create_feature_extractor(net, {"act2": "y"})(x)["y"]


def apply(name: str, net: nn.Module, x: Tensor) -> Tensor | Exception:
    """What a copy of the net computes after the tool, or what the tool or the call raised."""
    torch.manual_seed(0)
    net = copy.deepcopy(net).eval()
    try:
        return TOOLS[name](net, x.clone()).detach()
    except Exception as error:
        return error
