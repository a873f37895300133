"""fuse_batchnorm_act: what is fused, that nothing else changes, and that training goes on alike."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bench import nets as bench_nets
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import (
    FUSE_NETS,
    TOLERANCE,
    Around,
    assert_trains_alike,
    build,
    calls,
    fuse_separately,
    images,
)

# What a whole net has, counted by hand: (activation, with addition) -> batch norms.
EXPECTED = {
    "resnet": {("relu", False): 4, ("relu", True): 3},
    "mobilenet": {("relu6", False): 8, ("identity", True): 1},
    "densenet": {("relu", False): 8},
    "regnet_y": {("relu", False): 7, ("relu", True): 3},
    "resnet_d": {("relu", False): 5, ("relu", True): 3},
}
EXPECTED_LARGE = {
    "resnet18": {("relu", False): 9, ("relu", True): 8},
    "resnet50": {("relu", False): 33, ("relu", True): 16},
    "mobilenet_v2": {("relu6", False): 35, ("identity", True): 10},
    "densenet121": {("relu", False): 121},
}


def kinds(report):
    return Counter((act, residual) for _, act, residual in report.fused)


@pytest.mark.parametrize("name", FUSE_NETS)
def test_every_chain_of_a_net_is_fused(name):
    model = build(name)
    fused, report = fuse_batchnorm_act(model)
    assert kinds(report) == EXPECTED[name]
    assert report.refused == []
    assert report.not_traced == []
    assert isinstance(fused, type(model))
    assert calls(fused) == len(report.fused)
    # Every module is what and where it was, the batch norms converted.
    plain = bnorm_ext.convert_batchnorm(copy.deepcopy(model))
    kinds_of = [[(n, type(m)) for n, m in net.named_modules() if n] for net in (fused, plain)]
    assert kinds_of[0] == kinds_of[1]


@pytest.mark.parametrize("name", EXPECTED_LARGE)
def test_every_chain_of_a_large_net_is_fused(name):
    _, report = fuse_batchnorm_act(bench_nets.NETS[name]())
    assert kinds(report) == EXPECTED_LARGE[name]
    assert report.refused == []
    assert report.not_traced == []


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", FUSE_NETS)
def test_fused_net_trains_as_the_plain_one(name, given):
    plain = build(name)
    fused, _ = fuse_separately(plain, *([images(0)] if given else []))
    assert_trains_alike(fused, plain, [images(seed) for seed in range(5)])


@pytest.mark.parametrize("name", FUSE_NETS)
def test_tensors_and_their_names_stay(name):
    model = build(name)
    model.unused = nn.Linear(2, 3)  # the graph does not know it
    model.register_buffer("late", torch.ones(2))
    fused, _ = fuse_batchnorm_act(model)
    for now, then in (
        (fused.named_parameters(), model.named_parameters()),
        (fused.named_buffers(), model.named_buffers()),
    ):
        now, then = list(now), list(then)
        assert [path for path, _ in now] == [path for path, _ in then]
        assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True))
    assert list(fused.state_dict()) == list(model.state_dict())


def description(model):
    """All that can be seen of a model's modules, and copies of its tensors."""
    modules = {
        path: (type(module), module, {k: v for k, v in vars(module).items() if k[0] != "_"})
        for path, module in model.named_modules()
    }
    hooks = {path: list(module._forward_hooks.items()) for path, module in model.named_modules()}
    return modules, hooks


@pytest.mark.parametrize("name", FUSE_NETS)
def test_given_model_is_untouched(name):
    model = build(name)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda m, a, y: None)
    tensors = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    before = description(model)
    random_state = torch.get_rng_state()
    fused, _ = fuse_batchnorm_act(model)
    assert description(model) == before
    for change in (fused.eval, fused.train, lambda: fused.requires_grad_(True)):
        change()
        assert description(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for path, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[path]), path


@pytest.mark.parametrize("name", FUSE_NETS)
def test_checkpoints_load_both_ways(name):
    plain = build(name)
    fused, _ = fuse_separately(build(name, seed=1))
    plain(images(0))
    fused.load_state_dict(plain.state_dict(), strict=True)
    other = build(name, seed=2)
    other.load_state_dict(fused.state_dict(), strict=True)
    for net in (plain, fused, other):
        net.eval()
    assert torch.equal(other(images(1)), plain(images(1)))
    torch.testing.assert_close(fused(images(1)), plain(images(1)), **TOLERANCE)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_fusing_in_the_middle_of_training(optimizer_class):
    plain = build("resnet")
    changing = copy.deepcopy(plain)
    kwargs = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizers = [optimizer_class(net.parameters(), lr=0.01, **kwargs) for net in (changing, plain)]
    for step in range(5):
        if step == 2:
            changing, _ = fuse_batchnorm_act(changing)
        for net, optimizer in zip((changing, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(images(step)), torch.arange(4)).backward()
            optimizer.step()
    # Adam magnifies rounding where a true gradient is nearly zero: see test_convert.py.
    for path, tensor in plain.state_dict().items():
        torch.testing.assert_close(changing.state_dict()[path], tensor, rtol=0.0, atol=6e-10)
    resumed = optimizer_class(changing.parameters(), lr=0.01, **kwargs)
    resumed.load_state_dict(optimizers[1].state_dict())  # by order of parameters
    shapes = [p.shape for p in resumed.state if resumed.state[p]]
    assert shapes == [p.shape for p in plain.parameters()]


def test_a_converted_model_and_a_fused_one_are_fused_as_well():
    model = bnorm_ext.convert_batchnorm(build("resnet"))
    once, report = fuse_batchnorm_act(model)
    assert kinds(report) == EXPECTED["resnet"]
    again, report = fuse_batchnorm_act(once)
    assert kinds(report) == EXPECTED["resnet"]
    assert calls(again) == calls(once)
    torch.testing.assert_close(again(images(0)), once(images(0)), **TOLERANCE)


@pytest.mark.parametrize("wrong", [None, nn.ReLU, {"weight": 1}])
def test_anything_but_a_module_is_an_error(wrong):
    with pytest.raises(TypeError, match=r"fuse_batchnorm_act expects a torch\.nn\.Module"):
        fuse_batchnorm_act(wrong)


def test_batch_norms_that_no_graph_calls_are_listed():
    class Unused(Around):
        def __init__(self):
            super().__init__(nn.Identity())
            self.aux = nn.BatchNorm2d(3)

    _, report = fuse_batchnorm_act(Unused())
    assert report.not_called == ["aux"]
    assert str(report).splitlines()[-2:] == ["1 not called by a traced forward", "  aux"]
