"""Tools that meet batch norms, each with what comes of it: right, or refused, none of them silent.

On a converted or fused net a tool does what it does on the native one, in numbers and exceptions.
On modules with an activation of their own it keeps that activation, or refuses.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnorm_ext
from tests.common import model_tools, model_tools_packages  # noqa: F401  # they fill the table
from tests.common.tool_table import TOOLS, apply

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of the tools: many are deprecated, some speak of what they leave out.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ACTS = {"relu": nn.ReLU, "silu": nn.SiLU}

# Tools that would make another layer of a batch norm and lose its activation.
REBUILDING = {
    "SyncBatchNorm.convert_sync_batchnorm",
    "fuse_conv_bn_eval",
    "fuse_conv_bn_eval, transposed",
    "fuse_linear_bn_eval",
    "utils.mkldnn.to_mkldnn",
    "ao.nn.quantized.BatchNorm2d.from_float",
    "timm: freeze_batch_norm_2d",
    "timm: freeze_batch_norm_2d and unfreeze_batch_norm_2d",
    "timm: freeze",
    "timm: convert_splitbn_model",
    "timm: convert_sync_batchnorm",
}
# Quantisation in eager mode goes by exact types and raises for others; reverting comes first.
EXACT = {
    "ao.quantization.fuse_modules": "did not find fuser method for",
    "ao.quantization.fuse_modules_qat": "did not find fuser method for",
    "torchvision: models.quantization's _fuse_modules": "did not find fuser method for",
    "ao.quantization.prepare and convert": "Could not run 'aten::native_batch_norm'",
}
# These round to 8 bits, at other places where batch norms are not folded. Results lie within
# about +-8, a step is 16 / 255 = 0.06, and some 10 roundings of half a step make 0.3. Without an
# activation results are wrong by their own size.
QUANTISING = {
    "ao.quantization.prepare_qat",
    "ao.quantization.prepare_fx and convert_fx",
    "ao.quantization.prepare_qat_fx and convert_fx",
}
STEPS: dict[str, float] = {"rtol": 0.0, "atol": 0.6}
# Float32, u = 6e-8: sums of 54 terms of up to 16, twice, where the native one is folded: 54 u * 16
# * 2 = 1e-4.
FLOAT32: dict[str, float] = {"rtol": 0.0, "atol": 1e-4}


class Net(nn.Module):
    def __init__(self, act: type[nn.Module], norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, bias=False)
        self.bn1, self.bn2 = norm(6), norm(6)
        self.act1, self.act2 = act(), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


def native(act: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net(ACTS[act])
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-1, 1)
        for bn in (net.bn1, net.bn2):
            bn.running_mean.uniform_(-1, 1)
            bn.running_var.uniform_(0.5, 2)
    return net.eval()


def make(kind: str, act: str) -> nn.Module:
    net = native(act)
    if kind == "native":
        return net
    if kind == "converted":
        return bnorm_ext.convert_batchnorm(net)
    if kind == "fused":
        fused, report = bnorm_ext.fuse_batchnorm_act(net)
        assert len(report.fused) == 2
        return fused
    own = Net(nn.Identity, lambda channels: bnorm_ext.BatchNormAct2d(channels, act=act))
    own.load_state_dict(net.state_dict(), strict=True)
    return own.eval()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run(name: str, kind: str, act: str) -> Tensor | Exception:
    if name.startswith("torchvision"):
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="tools of timm")
    return apply(name, make(kind, act), images())


def tolerance(name: str) -> dict[str, float]:
    return STEPS if name in QUANTISING else FLOAT32


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["converted", "fused"])
@pytest.mark.parametrize("name", TOOLS)
def test_as_on_the_native_net(name, kind, act):
    found, expected = run(name, kind, act), run(name, "native", act)
    if name in EXACT:
        assert isinstance(found, Exception)
        assert EXACT[name] in str(found)
    elif isinstance(expected, Exception):
        assert (type(found), str(found)) == (type(expected), str(expected))
    else:
        assert isinstance(found, Tensor), found
        torch.testing.assert_close(found, expected, **tolerance(name))


@pytest.mark.parametrize("kind", ["converted", "fused"])
@pytest.mark.parametrize("name", EXACT)
def test_reverted_where_types_must_be_exact(name, kind):
    if name.startswith("torchvision"):
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    found = apply(name, bnorm_ext.revert_batchnorm(make(kind, "relu")), images())
    expected = run(name, "native", "relu")
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected, **FLOAT32)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", TOOLS)
def test_keeps_the_activation_or_refuses(name, act):
    found = run(name, "act", act)
    if name in REBUILDING:
        assert isinstance(found, RuntimeError)
        assert "would lose its activation" in str(found)
        assert f"act={act}" in str(found)
    elif name in EXACT:
        assert isinstance(found, Exception)
        assert EXACT[name] in str(found)
    else:
        expected = run(name, "native", act)
        assert isinstance(expected, Tensor), expected
        assert isinstance(found, Tensor), found
        torch.testing.assert_close(found, expected, **tolerance(name))


def test_losing_an_activation_would_show():
    """The tolerances are far below what the tests above look for."""
    for act in ACTS:
        net = native(act)
        without = copy.deepcopy(net)
        without.act2 = nn.Identity()
        assert (without(images()) - net(images())).abs().max() > 5 * STEPS["atol"]


# ---- Nets of timm, with batch norms that activate -----------------------------------------------

NAMES = [name for name in TOOLS if name in REBUILDING and name.startswith("timm")]
NAMES += ["timm: reparameterize_model", "timm: ModelEmaV3", "swa_utils.update_bn", "jit.trace"]


def timm_net(name: str, kind: str, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="nets of timm")
    torch.manual_seed(0)
    net = timm.create_model(name, **kwargs).eval()
    if kind == "converted":
        return bnorm_ext.convert_batchnorm(net)
    return net if kind == "native" else bnorm_ext.fuse_batchnorm_act(net)[0]


@pytest.mark.parametrize("tool", [*NAMES, "SyncBatchNorm.convert_sync_batchnorm"])
@pytest.mark.parametrize("kind", ["converted", "fused"])
@pytest.mark.parametrize("net", ["test_efficientnet", "test_byobnet"])
def test_timm_nets(net, kind, tool):
    x = torch.randn(2, 3, 64, 64)
    found = apply(tool, timm_net(net, kind), x)
    if tool == "SyncBatchNorm.convert_sync_batchnorm":
        # torch's own conversion drops timm's activations without a word; not those of ours.
        assert isinstance(found, RuntimeError)
        assert "would lose its activation" in str(found)
        return
    expected = apply(tool, timm_net(net, "native"), x)
    assert isinstance(expected, Tensor), expected
    assert isinstance(found, Tensor), found
    # Some 30 layers in float32, as of test_fuse.py's other dtype.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_timm_features(kind):
    """timm takes nets apart and calls the stages itself."""
    x = torch.randn(2, 3, 64, 64)
    found, expected = (
        timm_net("test_efficientnet", name, features_only=True)(x) for name in (kind, "native")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_timm_builds_layers_with_ours():
    """A class of timm's is to stay recognisable: instance and pickle."""
    import pickle

    layers = pytest.importorskip("timm.layers")
    net = timm_net("test_efficientnet", "converted")
    norms = [m for m in net.modules() if isinstance(m, layers.BatchNormAct2d)]
    assert norms
    assert {type(m).__module__ for m in norms} == {"bnorm_ext.modules_timm"}
    twin = pickle.loads(pickle.dumps(norms[0]))
    assert type(twin) is type(norms[0])
    assert importlib.import_module("bnorm_ext.modules_timm").BatchNormAct2d is type(twin)
