"""A fused net stays right whatever becomes of its modules: the call looks at them when it runs."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import (
    TOLERANCE,
    assert_same_results,
    assert_trains_alike,
    build,
    fuse_separately,
    images,
    layer,
)


def replace_activation(net):
    net.layer1[0].relu = nn.SiLU()
    net.layer2[0].relu = nn.GELU()


def replace_batch_norm(net):
    torch.manual_seed(3)
    net.layer1[0].bn1 = nn.BatchNorm2d(8, momentum=0.7).double()
    net.layer2[0].bn1 = nn.GroupNorm(2, 16).double()


def freeze(net):
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)


def fold(net):
    block = net.layer1[0].eval()
    block.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()


def change_slope(net):
    net.layer1[0].relu = nn.LeakyReLU(0.3)


def add_a_layer(net):
    net.layer1.append(nn.Tanh())


def replace_a_container(net):
    net.layer1 = nn.Sequential(nn.Tanh(), nn.Sigmoid())


def replace_a_forward(net):
    block = net.layer1[0]
    block.forward = lambda x: x * 2
    net.layer2[0].bn1.forward = lambda x: x * 3
    net.layer2[0].relu.forward = lambda x: torch.tanh(x)


def hook_everything(net):
    for name, module in list(net.named_modules()):
        if name:
            module.register_forward_hook(lambda m, a, y: y * 1.01)


CHANGES = [
    replace_activation,
    replace_batch_norm,
    freeze,
    fold,
    change_slope,
    add_a_layer,
    replace_a_container,
    replace_a_forward,
    hook_everything,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_fusing(change):
    plain = build("resnet")
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 7
    for net in (plain, fused):
        change(net)
    optimizable = [p for p in plain.parameters() if p.requires_grad]
    assert optimizable
    for training in (True, False):
        if change is not freeze and change is not fold:
            plain.train(training), fused.train(training)
        results = []
        for net in (fused, plain):
            x = images(1).requires_grad_()
            y = net(x)
            y.square().mean().backward()
            results.append((y, x.grad, dict(net.named_buffers())))
        torch.testing.assert_close(*results, **TOLERANCE)


def test_an_attribute_that_forward_reads():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.scale, self.sizes = layer(), 2.0, [1, 2]

        def forward(self, x):
            return self.block(x) * self.scale + self.sizes[0]

    plain = nn.Sequential(Scaled()).double()
    fused, _ = fuse_separately(plain)
    for net in (plain, fused):
        net[0].scale = 3.0
    assert_trains_alike(fused, plain, [images(0)])
    for net in (plain, fused):
        net[0].sizes[0] = 5
    assert_trains_alike(fused, plain, [images(1)])


def test_children_in_another_net():
    plain = build("resnet")
    fused, _ = fuse_separately(plain)
    nets = [nn.Sequential(*list(net.children())[:-1]) for net in (fused, plain)]
    assert_trains_alike(*nets, [images(seed) for seed in range(2)])


class Optional(nn.Module):
    """Not traced as a whole; what it does with its Sequential is up to ``way``."""

    def __init__(self, way):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
        self.way = way

    def forward(self, x, mask=None):
        return self.way(self.model, x)


def iterate(model, x):
    for module in model:
        x = module(x)
    return x


WAYS = {
    "call": lambda model, x: model(x),
    "index": lambda model, x: torch.tanh(model[1](model[0](x))),
    "iterate": iterate,
    "slice": lambda model, x: torch.tanh(model[:2](x)),
    "last": lambda model, x: model[-1](x),
    "children": lambda model, x: iterate(model.children(), x),
    "named": lambda model, x: model.get_submodule("1")(model.get_submodule("0")(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_container_of_an_untraced_module(way):
    plain = Optional(WAYS[way]).double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("model.1", "silu", False)]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(2)])
    assert isinstance(fused.model[:2], nn.Sequential)


class InOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"pool": nn.AvgPool2d(3), "tanh": nn.Tanh()})
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        for child in self.layers.values():
            x = child(x)
        return torch.relu(self.bn(x))


def test_children_in_another_order():
    plain = InOrder().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn", "relu", False)]
    for net in (plain, fused):
        net.layers["pool"] = net.layers.pop("pool")
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)


def test_stacked_copies():
    models = [build("resnet", seed).eval() for seed in range(3)]
    fused = [fuse_separately(model)[0] for model in models]
    params, buffers = torch.func.stack_module_state(fused)
    base = copy.deepcopy(fused[0]).to("meta")

    def run(p, b, x):
        return torch.func.functional_call(base, (p, b), (x,))

    y = torch.vmap(run, (0, 0, None))(params, buffers, images(0))
    torch.testing.assert_close(y, torch.stack([m(images(0)) for m in models]), **TOLERANCE)


@pytest.mark.parametrize("undo", [lambda net: net.unfuse(), bnorm_ext.revert_batchnorm])
@pytest.mark.parametrize("root", ["traced", "untraced"])
def test_undone(undo, root):
    plain = build("resnet") if root == "traced" else Optional(iterate).double()
    fused, _ = fuse_separately(plain)
    state = {path: (type(m), vars(m).keys()) for path, m in plain.named_modules()}
    assert undo(fused) is fused
    assert {path: (type(m), vars(m).keys()) for path, m in fused.named_modules()} == state
    assert_trains_alike(fused, plain, [images(0)])


def test_modules_and_methods_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = layer(), nn.Linear(3, 2)

        def forward_features(self, x):
            return self.features(x)

        def forward(self, x):
            return self.head(self.forward_features(x).mean((2, 3)))

    plain = Model().double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1
    assert isinstance(fused, Model)
    assert type(fused).__name__ == "Model"
    assert repr(fused) == repr(bnorm_ext.convert_batchnorm(copy.deepcopy(plain)))
    x = images(0)
    torch.testing.assert_close(fused.forward_features(x), plain.forward_features(x), **TOLERANCE)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fused.nonsense


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.block, self.kind = layer(), kind

    def forward(self, x):
        return self.kind(self.block(x), x)


CONTAINERS = {
    "OrderedDict": lambda y, x: OrderedDict(out=y, inner=OrderedDict(x=[x, (y,)])),
    "dict": lambda y, x: {"out": y, "x": x},
    "list": lambda y, x: [y, [x]],
    "tuple": lambda y, x: (y, (x, None)),
    "named": lambda y, x: torch.return_types.max((y, x)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_outputs_keep_their_container(kind):
    plain = Outputs(CONTAINERS[kind]).double()
    fused, _ = fuse_separately(plain)
    ours, native = fused(images(0)), plain(images(0))

    def same(a, b):
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            a, b = list(a.values()), list(b.values())
        if isinstance(a, list | tuple):
            for x, y in zip(a, b, strict=True):
                same(x, y)
        elif a is not None:
            torch.testing.assert_close(a, b, **TOLERANCE)

    same(ours, native)


def test_adding_none_raises_what_it_raised():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, r):
            return F.relu(self.bn(x) + r)

    plain = Adds()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1
    texts = []
    for net in (plain, fused):
        with pytest.raises(TypeError) as error:
            net(torch.randn(2, 3, 4, 4), None)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_fused_once_more_and_converted():
    plain = build("mobilenet")
    fused, report = fuse_separately(plain)
    again, second = fuse_batchnorm_act(bnorm_ext.convert_batchnorm(fused))
    assert second.fused == report.fused
    again = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert_same_results(again, plain, steps=1)
