"""Tools of torch that meet batch norms: each one applied to a net, and what the result then
computes. `test_tools.py` holds the table of what comes of it."""

from __future__ import annotations

import importlib

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from tests.common.tool_table import TOOLS, tool

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


def layers_to_fuse(net: nn.Module) -> list[list[str]]:
    """Layers to fuse; without activation where the batch norm has it."""
    if isinstance(net.act1, nn.Identity):
        return [["conv1", "bn1"], ["conv2", "bn2"]]
    return [["conv1", "bn1", "act1"], ["conv2", "bn2", "act2"]]


@tool("ao.quantization.fuse_modules")
def _(net, x):
    return ao.fuse_modules(net, layers_to_fuse(net))(x)


@tool("ao.quantization.fuse_modules_qat")
def _(net, x):
    return ao.fuse_modules_qat(net.train(), layers_to_fuse(net)).eval()(x)


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


@tool("nn.utils.prune, removed")
def _(net, x):
    prune.random_unstructured(net.bn1, "bias", 2)
    prune.remove(net.bn1, "bias")
    return net(x)


@tool("nn.utils.weight_norm")
def _(net, x):
    nn.utils.weight_norm(net.bn1)
    y = net(x)
    nn.utils.remove_weight_norm(net.bn1)
    return torch.stack([y, net(x)])


@tool("nn.utils.stateless.functional_call")
def _(net, x):
    scaled = {name: 1.1 * p for name, p in net.named_parameters()}
    return nn.utils.stateless.functional_call(net, scaled, (x,))


@tool("checkpoint_wrapper")
def _(net, x):
    wrapper = importlib.import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    net.bn1, net.act2 = wrapper.checkpoint_wrapper(net.bn1), wrapper.checkpoint_wrapper(net.act2)
    return net(x)


@tool("utils.flop_counter.FlopCounterMode")
def _(net, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return torch.tensor(float(counter.get_total_flops()))


@tool("fx.passes.split_module")
def _(net, x):
    from torch.fx.passes.split_module import split_module

    traced = torch.fx.symbolic_trace(net)
    place = {node: i // 3 for i, node in enumerate(traced.graph.nodes)}
    return split_module(traced, net, place.__getitem__)(x)


@tool("fx.experimental.normalize.NormalizeArgs")
def _(net, x):
    from torch.fx.experimental.normalize import NormalizeArgs

    return NormalizeArgs(torch.fx.symbolic_trace(net)).transform()(x)


@tool("fx.experimental.proxy_tensor.make_fx")
def _(net, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda given: net(given))(x)(x)


@tool("export and unflatten")
def _(net, x):
    return torch.export.unflatten(torch.export.export(net, (x,)))(x)


@tool("nn.DataParallel")
def _(net, x):
    return nn.DataParallel(net)(x)


@tool("load_state_dict, assign=True, after to_empty")
def _(net, x):
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net = net.to("meta").to_empty(device="cpu")
    net.load_state_dict(state, assign=True)
    return net(x)
