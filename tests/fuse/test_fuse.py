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
from bnorm_ext.fuse.call import batch_norm_add_act
from tests.common.fuse_nets import (
    FUSE_NETS,
    TOLERANCE,
    assert_trains_alike,
    build,
    fuse_separately,
    images,
    inputs,
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


def calls(fused):
    """The fused calls in its graph."""
    return sum(node.target is batch_norm_add_act for node in fused.fused_graph.nodes)


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


class Block(nn.Module):
    """conv, batch norm, and what ``tail`` does with its output and the input."""

    def __init__(self, tail, act=None, dims=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.conv, self.bn = conv(3, 3, 3, padding=1), norm(3)
        self.act, self.tail = act, tail

    def forward(self, x):
        return self.tail(self, self.bn(self.conv(x)), x)


MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda **kwargs: nn.LeakyReLU(0.2, **kwargs),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
FUNCTIONS = {
    "F.relu": (lambda z: F.relu(z), "relu"),
    "F.relu inplace": (lambda z: F.relu(z, inplace=True), "relu"),
    "F.relu positional": (lambda z: F.relu(z, True), "relu"),
    "F.relu6": (lambda z: F.relu6(z), "relu6"),
    "F.leaky_relu default": (lambda z: F.leaky_relu(z), "leaky_relu"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.2, True), "leaky_relu"),
    "F.leaky_relu by name": (lambda z: F.leaky_relu(z, negative_slope=0.2), "leaky_relu"),
    "F.silu": (lambda z: F.silu(z, inplace=True), "silu"),
    "F.hardswish": (lambda z: F.hardswish(z), "hardswish"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu by name": (lambda z: torch.relu(input=z), "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "F.relu_": (F.relu_, "relu"),
    "relu": (lambda z: z.relu(), "relu"),
    "relu_": (lambda z: z.relu_(), "relu"),
}


def iadd(y, x):
    y += x
    return y


ADDITIONS = {
    "none": lambda y, x: y,
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "y += x": iadd,
    "torch.add": lambda y, x: torch.add(x, y),
    "torch.add by name": lambda y, x: torch.add(y, other=x, alpha=1),
    "add": lambda y, x: y.add(x),
    "add_": lambda y, x: y.add_(x),
}


def check_block(block, act, residual, shape=(4, 3, 5, 6)):
    """That the batch norm of a block is fused as said, and the block trains as before."""
    block.double()
    fused, report = fuse_separately(block)
    assert report.fused == [("bn", act, residual)]
    assert report.refused == []
    left = [node.op for node in fused.fused_graph.nodes if node.op != "get_attr"]
    assert left == ["placeholder", "call_module", "call_function", "output"]
    assert calls(fused) == 1
    assert_trains_alike(fused, block, inputs(shape))


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", MODULES)
def test_activation_modules(act, inplace, addition):
    def tail(self, y, x):
        return self.act(ADDITIONS[addition](y, x))

    block = Block(tail, MODULES[act](inplace=inplace))
    check_block(block, act, addition != "none")


@pytest.mark.parametrize("addition", ["none", "x + y"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_functions(function, addition):
    call, act = FUNCTIONS[function]
    block = Block(lambda self, y, x: call(ADDITIONS[addition](y, x)))
    check_block(block, act, addition != "none")


@pytest.mark.parametrize("addition", [name for name in ADDITIONS if name != "none"])
def test_addition_without_activation(addition):
    check_block(Block(lambda self, y, x: ADDITIONS[addition](y, x)), "identity", True)


@pytest.mark.parametrize(("dims", "shape"), [(1, (4, 3, 7)), (3, (2, 3, 4, 3, 5))])
def test_dimensions(dims, shape):
    block = Block(lambda self, y, x: F.relu(y + x), dims=dims)
    check_block(block, "relu", True, shape)


def test_the_slope_comes_with_the_activation():
    block = Block(lambda self, y, x: self.act(y), nn.LeakyReLU(0.3)).double()
    fused, _ = fuse_separately(block)
    assert_trains_alike(fused, block, inputs(), **TOLERANCE)


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        a, b = self.bn1(self.conv1(x)), self.bn2(self.conv2(x))
        a += b
        return torch.relu(a)


def test_of_two_batch_norms_the_later_takes_the_addition():
    plain = TwoNorms().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn2", "relu", True)]
    assert report.refused == []
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_if_the_later_cannot_the_earlier_takes_it():
    plain = TwoNorms().double()
    plain.bn2.register_forward_hook(lambda m, a, y: None)
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn1", "relu", True)]
    assert report.refused == [("bn2", "it has forward hooks")]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_a_converted_model_and_a_fused_one_are_fused_as_well():
    model = bnorm_ext.convert_batchnorm(build("resnet"))
    once, report = fuse_batchnorm_act(model)
    assert kinds(report) == EXPECTED["resnet"]
    again, report = fuse_batchnorm_act(once)
    assert kinds(report) == EXPECTED["resnet"]
    assert calls(again) == calls(once)
    torch.testing.assert_close(again(images(0)), once(images(0)), **TOLERANCE)


def test_an_activation_after_a_module_that_adds():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnorm_ext.BatchNormAct2d(3, act=None)

        def forward(self, x):
            return F.silu(self.bn(x, residual=x))

    plain = Adds().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("bn", "silu", True)]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_report_as_text():
    model = nn.Sequential(Block(lambda self, y, x: F.relu(y + x)), TwoNorms(), nn.SyncBatchNorm(3))
    model[1].bn2.register_forward_hook(lambda m, a, y: None)
    _, report = fuse_batchnorm_act(model)
    assert str(report).splitlines() == [
        "2 batch norms fused",
        "  0.bn: with addition and relu",
        "  1.bn1: with addition and relu",
        "2 refused",
        "  1.bn2: it has forward hooks",
        "  2: torch.nn.modules.batchnorm.SyncBatchNorm may do more than batch normalisation",
    ]
    with pytest.raises(AttributeError):
        report.fused = []


@pytest.mark.parametrize("wrong", [None, nn.ReLU, {"weight": 1}])
def test_anything_but_a_module_is_an_error(wrong):
    with pytest.raises(TypeError, match=r"fuse_batchnorm_act expects a torch\.nn\.Module"):
        fuse_batchnorm_act(wrong)
