"""BatchNormAct1d, 2d and 3d as modules: construction, state, and the tools that meet them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

import bnorm_ext
from bnorm_ext import convert_batchnorm, revert_batchnorm
from tests.common.twins import FLOAT64, NATIVE, SHAPES, assert_same, outcome, step

OURS = {
    1: bnorm_ext.BatchNormAct1d,
    2: bnorm_ext.BatchNormAct2d,
    3: bnorm_ext.BatchNormAct3d,
}
# name: the function, the module class, what the module's constructor takes
ACTS = {
    "identity": (lambda z: z, nn.Identity),
    "relu": (F.relu, nn.ReLU),
    "relu6": (F.relu6, nn.ReLU6),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.01), nn.LeakyReLU),
    "silu": (F.silu, nn.SiLU),
    "hardswish": (F.hardswish, nn.Hardswish),
}


class Composition(nn.Module):
    """The separate operations."""

    def __init__(self, norm, act):
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x, residual=None):
        y = self.norm(x)
        return self.act(y if residual is None else y + residual)


def batch(dims=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64)


def build(act="relu", dims=2, **kwargs):
    module = OURS[dims](5, act=act, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-2, 2)
    return module


def composition(module, act=None):
    """Native's modules with the state of ``module``."""
    dims = next(d for d, cls in OURS.items() if isinstance(module, cls))
    norm = NATIVE[dims](5, module.eps, module.momentum, dtype=torch.float64)
    norm.load_state_dict(module.state_dict(), strict=True)
    return Composition(norm.train(module.training), act or ACTS[module.act][0])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", OURS)
@pytest.mark.parametrize("act", ACTS)
def test_training_and_evaluation(act, dims, residual):
    ours = build(act, dims)
    native = composition(ours)
    x, dy, r = (batch(dims, seed) for seed in range(3))
    for training in (True, True, False):
        results = []
        for module in (ours.train(training), native.train(training)):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = module(a, b) if residual else module(a)
            y.backward(dy)
            norm = getattr(module, "norm", module)
            results.append([y, a.grad, norm.weight.grad, norm.bias.grad, norm.running_var.clone()])
            results[-1] += [b.grad] if residual else []
        torch.testing.assert_close(*results, **FLOAT64)
    assert ours.num_batches_tracked == native.norm.num_batches_tracked == 2


def test_constructor_arguments():
    module = bnorm_ext.BatchNormAct2d(
        6, 1e-3, 0.3, False, True, "leaky_relu", 0.2, device="meta", dtype=torch.bfloat16
    )
    assert (module.num_features, module.eps, module.momentum) == (6, 1e-3, 0.3)
    assert (module.affine, module.track_running_stats) == (False, True)
    assert (module.act, module.negative_slope) == ("leaky_relu", 0.2)
    assert module.weight is None
    assert module.running_mean.is_meta
    assert module.running_mean.dtype == torch.bfloat16
    default = bnorm_ext.BatchNormAct2d(6)
    assert (default.act, default.negative_slope) == ("relu", 0.01)
    assert (default.eps, default.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("dims", OURS)
def test_repr(dims):
    plain = repr(NATIVE[dims](5)).partition("(")[2]
    name = f"BatchNormAct{dims}d("
    assert repr(OURS[dims](5)) == name + plain[:-1] + ", act=relu)"
    assert repr(OURS[dims](5, act=None)) == name + plain[:-1] + ", act=identity)"
    leaky = OURS[dims](5, act="leaky_relu", negative_slope=0.2)
    assert repr(leaky) == name + plain[:-1] + ", act=leaky_relu, negative_slope=0.2)"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_is_the_plain_modules(act, kwargs):
    plain = nn.BatchNorm2d(5, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.fill_(3)
    ours = bnorm_ext.BatchNormAct2d(5, act=act, dtype=torch.float64, **kwargs)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), rtol=0.0, atol=0.0)
    nn.BatchNorm2d(5, **kwargs).load_state_dict(ours.state_dict(), strict=True)


def test_checkpoint_of_the_unfused_net_loads():
    unfused = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()).double()
    unfused(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    fused = nn.Sequential(nn.Conv2d(3, 5, 1), bnorm_ext.BatchNormAct2d(5)).double()
    fused.load_state_dict(unfused.state_dict(), strict=True)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), unfused.eval()(x), **FLOAT64)


@pytest.mark.parametrize("act", ACTS)
def test_activation_by_name_class_and_instance(act):
    cls = ACTS[act][1]
    for given in (act, cls, cls()):
        assert bnorm_ext.BatchNormAct2d(5, act=given).act == act
    assert bnorm_ext.BatchNormAct2d(5, act=None).act == "identity"


def test_slope_of_an_instance_goes_first():
    module = build(nn.LeakyReLU(0.2), negative_slope=0.5)
    assert module.negative_slope == 0.2
    assert build(nn.LeakyReLU, negative_slope=0.5).negative_slope == 0.5
    x = batch()
    native = composition(module, nn.LeakyReLU(0.2))
    torch.testing.assert_close(module(x), native(x), **FLOAT64)


@pytest.mark.parametrize("wrong", ["gelu", "ReLU", "", nn.GELU, nn.GELU(), nn.PReLU, F.relu, 1])
@pytest.mark.parametrize("dims", OURS)
def test_unknown_activation(dims, wrong):
    known = "identity, relu, relu6, leaky_relu, silu, hardswish"
    with pytest.raises(ValueError, match=f"unknown activation .*{known}.*LeakyReLU"):
        OURS[dims](5, act=wrong)


def test_residual_that_does_not_fit():
    module, x = build(), batch()
    for residual in (x[:, :, :1], x[:1], x.float(), x.to("meta")):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(RuntimeError, match=r"residual"):
            module(x, residual)
        assert_same(dict(module.state_dict()), dict(before), rtol=0.0, atol=0.0)


def test_sync_batch_norm_fails_loudly():
    """torch's conversion would put a module without activation there, without a word."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for act in ACTS:
        model = nn.Sequential(nn.Conv2d(3, 5, 1), bnorm_ext.BatchNormAct2d(5, act=act))
        if act == "identity":
            continue
        with pytest.raises(RuntimeError, match=f"act={act}.* would lose its activation"):
            convert(model)
        assert type(model[1]) is bnorm_ext.BatchNormAct2d


def test_sync_batch_norm_takes_one_without_activation():
    model = nn.Sequential(bnorm_ext.BatchNormAct2d(5, act=None))
    weight = model[0].weight
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert converted[0].weight is weight


def test_qconfig_can_be_set():
    """By quantisation, which sets it on every module."""
    module = bnorm_ext.BatchNormAct2d(5, act=None)
    assert not hasattr(module, "qconfig")
    module.qconfig = "mine"
    assert module.qconfig == "mine"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True])
def test_scripted(act, residual):
    ours = build(act, negative_slope=0.3)
    slope = nn.LeakyReLU(0.3) if act == "leaky_relu" else None
    native = composition(ours, slope)
    scripted = torch.jit.script(ours)
    x, r = batch(), batch(seed=1)
    args = (x, r) if residual else (x,)
    for training in (True, False):
        scripted.train(training), native.train(training)
        torch.testing.assert_close(scripted(*args), native(*args), **FLOAT64)
    torch.testing.assert_close(scripted.running_var, native.norm.running_var, **FLOAT64)
    assert scripted.num_batches_tracked == 1


def test_eps_that_is_set_later_reaches_compiled_code():
    torch._dynamo.reset()
    ours = build()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for eps in (1e-5, 0.5):
        ours.eps = eps
        native = composition(ours)
        torch.testing.assert_close(compiled(batch()), native(batch()), **FLOAT64)


def test_traced_by_fx_as_one_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = build("silu"), build("relu")

        def forward(self, x):
            return self.second(self.first(x), residual=x)

    net = Net()
    traced = symbolic_trace(copy.deepcopy(net))
    calls = [(node.op, node.target) for node in traced.graph.nodes]
    assert calls[1:3] == [("call_module", "first"), ("call_module", "second")]
    assert len(calls) == 4
    torch.testing.assert_close(traced(batch()), net(batch()), **FLOAT64)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_and_pickled(duplicate):
    module = build("leaky_relu", negative_slope=0.2)
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    assert twin.weight is not module.weight
    x, dy = batch(), batch(seed=1)
    assert_same(step(twin, x, dy), step(module, x, dy), rtol=0.0, atol=0.0)


def test_conversion_leaves_it_without_a_word():
    model = nn.Sequential(bnorm_ext.BatchNormAct2d(5), nn.BatchNorm2d(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_batchnorm(model)
    assert type(model[0]) is bnorm_ext.BatchNormAct2d


def test_reverting_leaves_and_names_it():
    model = nn.Sequential(bnorm_ext.BatchNormAct2d(5), bnorm_ext.BatchNorm2d(5))
    with pytest.warns(UserWarning, match="revert_batchnorm left.*BatchNormAct2d: 0$"):
        revert_batchnorm(model)
    assert [type(m) for m in model] == [bnorm_ext.BatchNormAct2d, nn.BatchNorm2d]


def test_rank_is_checked_as_natively():
    for dims, cls in OURS.items():
        for x in (torch.zeros(5), torch.zeros(2, 5, 2), torch.zeros(2, 5, 2, 2)):
            plain = outcome(lambda x=x, dims=dims: NATIVE[dims](5)(x))
            assert outcome(lambda x=x, cls=cls: cls(5)(x)) == plain
