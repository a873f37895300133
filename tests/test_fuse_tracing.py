"""What fuse_batchnorm_act does where tracing would freeze, lose or break something."""

from __future__ import annotations

import copy
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
from fuse_nets import TOLERANCE, assert_trains_alike, build, fuse_separately, images
from nets import conv_norm_act
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act


def layer(c_in=3, c_out=3):
    """Traceable, with one chain to fuse."""
    return conv_norm_act(nn.BatchNorm2d, c_in, c_out)


class Around(nn.Module):
    """A chain, a module, a chain."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.after = layer(), inner, layer()

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Inner(nn.Module):
    """A chain of its own, two in children, and what a subclass does with the result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.stack, self.listed = nn.Sequential(layer()), nn.ModuleList([layer()])

    def forward(self, x):
        return self.do(self.listed[0](self.stack(torch.relu(self.bn(self.conv(x))))))

    def do(self, x):
        return x


class ByValue(Inner):
    def do(self, x):
        return x if x.sum() > 0 else -x


class ByLength(Inner):
    def do(self, x):
        return torch.cat(list(x)).view_as(x)


class FunctionalDropout(Inner):
    def do(self, x):
        return F.dropout(x, 0.5, self.training)


class OtherResult(Inner):
    """The same operations in both modes, another of their results."""

    def do(self, x):
        y = x * 2
        return x if self.training else y


class RandomPath(Inner):
    def do(self, x):
        return x if torch.rand(()) < 0.5 else 2 * x


class RandomPathOfPython(Inner):
    def do(self, x):
        return x if random.random() < 0.5 else 2 * x


class Counts(Inner):
    calls = 0

    def do(self, x):
        self.calls += 1
        return x


class CountsAndFails(Counts):
    def do(self, x):
        x = super().do(x)
        return x if x.sum() > 0 else -x


class Remembers(Inner):
    def do(self, x):
        self.last = x
        return x


class Appends(Inner):
    def __init__(self):
        super().__init__()
        self.seen = []

    def do(self, x):
        self.seen.append(x)
        return x


class WithoutGradients(Inner):
    """One chain of it is run without gradients."""

    def forward(self, x):
        with torch.no_grad():
            y = self.stack(x)
        return self.listed[0](torch.relu(self.bn(self.conv(x))) + y)


class Autocast(Inner):
    def do(self, x):
        with torch.autocast("cpu", enabled=False):
            return x * 2


class Checkpointed(Inner):
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.listed[0](checkpoint(self.stack, x, use_reentrant=False))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class ReversesGradients(Inner):
    def do(self, x):
        return Reversed.apply(x)


class MakesTensor(Inner):
    def do(self, x):
        return x * torch.tensor([[[2.0]]], dtype=x.dtype if isinstance(x, torch.Tensor) else None)


class KeepsItsOwnState(Inner):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class FrozenNorms(Inner):
    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


UNFIT = {
    ByValue: "control flow",
    ByLength: "iterated",
    FunctionalDropout: "differs between training and evaluation",
    OtherResult: "differs between training and evaluation",
    RandomPath: "random numbers",
    RandomPathOfPython: "random numbers",
    Counts: "changes attributes",
    CountsAndFails: "control flow",
    Remembers: "changes attributes",
    Appends: "changes attributes",
    WithoutGradients: "switches gradients",
    Autocast: "the context autocast",
    Checkpointed: "the context|the autograd function",  # depends on the version of torch
    ReversesGradients: "the autograd function Reversed",
    MakesTensor: "makes a tensor",
    KeepsItsOwnState: "overrides get_extra_state",
    FrozenNorms: "overrides train",
}


def assert_same_results(fused, plain, steps=3, **tolerance):
    """As `assert_trains_alike`, with the same random numbers for both."""
    tolerance = tolerance or TOLERANCE
    for seed in range(steps):
        for training in (True, False):
            fused.train(training), plain.train(training)
            results = []
            for net in (fused, plain):
                torch.manual_seed(seed)
                random.seed(seed)
                x = images(seed).requires_grad_()
                y = net(x)
                y.square().sum().backward()
                results.append((y, x.grad))
            torch.testing.assert_close(*results, **tolerance)
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("cls", UNFIT)
def test_unfit_module_keeps_its_forward(cls):
    """What is around and inside it is fused; its own chain is not."""
    plain = Around(cls()).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert re.search(UNFIT[cls], report.not_traced[0][1])
    assert {name for name, *_ in report.fused} == {
        "before.1",
        "after.1",
        "inner.stack.0.1",
        "inner.listed.0.1",
    }
    assert type(fused.inner) is cls
    assert isinstance(fused, fx.GraphModule)
    assert isinstance(fused.inner.stack, fx.GraphModule)
    assert_same_results(fused, plain)


@pytest.mark.parametrize("cls", UNFIT)
def test_unfit_root_keeps_its_forward(cls):
    plain = cls().double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["(root)"]
    assert re.search(UNFIT[cls], report.not_traced[0][1])
    assert {name for name, *_ in report.fused} == {"stack.0.1", "listed.0.1"}
    assert type(fused) is cls
    assert type(fused.bn) is bnorm_ext.BatchNorm2d
    assert_same_results(fused, plain)


@pytest.mark.parametrize("cls", UNFIT)
def test_tracing_leaves_no_trace(cls):
    plain = Around(cls()).double()
    plain.inner.stack.eval()
    before = {path: dict(vars(module)) for path, module in plain.named_modules()}
    states = torch.get_rng_state(), random.getstate()
    fused, _ = fuse_batchnorm_act(plain)
    assert {path: dict(vars(module)) for path, module in plain.named_modules()} == before
    assert vars(fused.inner).get("seen", []) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    modes = {path: module.training for path, module in plain.named_modules()}
    assert {path: module.training for path, module in fused.named_modules()} == modes
    assert fused.inner.__dict__.keys().isdisjoint({"last", "calls"})


def test_optional_arguments_of_the_model():
    class Optional(Around):
        def forward(self, x, mask=None):
            y = super().forward(x)
            return y if mask is None else y * mask

    plain = Optional(nn.Identity()).double()
    fused, report = fuse_separately(plain)
    assert "optional arguments (mask)" in report.not_traced[0][1]
    assert {name for name, *_ in report.fused} == {"before.1", "after.1"}
    x = images(0)
    for args in ((x,), (x, 2 * x)):
        torch.testing.assert_close(fused(*args), plain(*args), **TOLERANCE)


def test_several_unfit_modules():
    plain = nn.Sequential(*(cls() for cls in UNFIT), layer()).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == [str(i) for i in range(len(UNFIT))]
    assert len(report.fused) == 2 * len(UNFIT) + 1
    # Some forty layers with running statistics of one batch: rounding grows a million times. A
    # chain that is fused wrongly is off by as much as the values.
    assert_same_results(fused, plain, steps=2, rtol=1e-6, atol=1e-6)


def test_every_functional_dropout_is_found():
    """Modules without children of their own, many of them, at several depths."""

    class Dropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    plain = nn.Sequential(
        layer(), Dropout(), nn.Sequential(layer(), Dropout()), Around(Dropout())
    ).double()
    fused, report = fuse_separately(plain)
    assert [path for path, _ in report.not_traced] == ["1", "2.1", "3.inner"]
    assert len(report.fused) == 4
    assert_same_results(fused, plain)


def test_buffers_are_those_of_the_day():
    """A buffer that is computed with or changed in place is in the graph, not frozen."""

    class Buffers(Around):
        def __init__(self):
            super().__init__(nn.Identity())
            self.register_buffer("scale", torch.zeros(1))

        def forward(self, x):
            self.scale.add_(1)
            return super().forward(x) * self.scale.exp()

    plain = Buffers().double()
    fused, report = fuse_separately(plain)
    assert report.not_traced == []
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])
    assert fused.scale == plain.scale == 4  # three steps and one evaluation


def test_in_place_operators_stay_in_place():
    """torch's own tracer makes ``v += 1`` out of place: ``v`` is a view here."""

    class Views(Around):
        def forward(self, x):
            y = super().forward(x) * 1
            v = y[:, 0]
            v += 1
            v[0] = 2
            return y

    plain = Views(nn.Identity()).double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 2
    assert_trains_alike(fused, plain, [images(seed) for seed in range(2)])
    loaded = pickle.loads(pickle.dumps(Graphed(fused)))  # pickling traces once more
    torch.testing.assert_close(loaded.module(images(3)), fused(images(3)), **TOLERANCE)


class Graphed:
    """Picklable around a fused module of a class that is not."""

    def __init__(self, module):
        self.module = module


def test_assigning_to_attributes_of_tensors():
    class Assigns(Around):
        def forward(self, x):
            y = super().forward(x)
            y.data = y.data * 2
            return y

    plain = Assigns(nn.Identity()).double()
    fused, report = fuse_separately(plain)
    assert "attribute data of a tensor" in report.not_traced[0][1]
    assert len(report.fused) == 2
    assert_same_results(fused, plain)


def test_hooks_on_modules_that_tracing_would_dissolve():
    plain = build("resnet")
    calls = []
    fused_calls = []

    def watch(net, calls):
        net.register_forward_hook(lambda m, a, y: calls.append("root"))
        net.layer1.register_forward_pre_hook(lambda m, a: (2 * a[0],))
        net.layer2.register_forward_hook(lambda m, a, y: calls.append(("layer2", y.detach())))
        net.layer3[0].register_full_backward_hook(
            lambda m, i, o: calls.append(("layer3.0", o[0].detach()))
        )

    hooked = copy.deepcopy(plain)
    watch(plain, calls)
    watch(hooked, fused_calls)
    hooked, report = fuse_batchnorm_act(hooked)
    assert len(report.fused) == 7
    assert report.refused == []
    assert report.not_traced == []
    assert_trains_alike(hooked, plain, [images(seed) for seed in range(3)])
    assert [c[0] for c in calls] == [c[0] for c in fused_calls]
    assert len(calls) == 3 * 3 + 2
    for ours, native in zip(fused_calls, calls, strict=True):
        if isinstance(ours, tuple):
            torch.testing.assert_close(ours[1], native[1], **TOLERANCE)


def test_attributes_and_modes_stay():
    model = build("resnet")
    model.note = ["mine"]
    model.layer1.eval()
    model.layer2[0].bn1.eval()
    fused, _ = fuse_batchnorm_act(model)
    assert fused.note == ["mine"]
    modes = {path: module.training for path, module in model.named_modules()}
    assert {path: module.training for path, module in fused.named_modules()} == modes
    fused.eval()
    assert not any(module.training for module in fused.modules())
    assert {path: module.training for path, module in model.named_modules()} == modes
    fused.train()
    assert all(module.training for module in fused.modules())


def test_dissolved_containers_cannot_be_called():
    """Their own forward would activate and add twice."""
    fused, _ = fuse_batchnorm_act(build("resnet"))
    for path in ("stem", "layer1", "layer1.0", "layer2.0"):
        with pytest.raises(NotImplementedError):
            fused.get_submodule(path)(images(0))


def test_a_model_without_chains_stays_what_it_is():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return self.stack(x)

    fused, report = fuse_batchnorm_act(Plain())
    assert type(fused) is Plain
    assert type(fused.stack[1]) is bnorm_ext.BatchNorm2d
    assert report.fused == []


def test_shared_blocks():
    """One block called at two places of one graph: its batch norms are called twice."""
    block = layer()
    plain = nn.Sequential(block, nn.ReLU(), block).double()
    fused, report = fuse_separately(plain)
    assert report.fused == []
    assert report.refused == [("0.1", "it is called more than once")] * 2
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_block_that_an_untraced_module_calls_twice():
    """Its graph is called twice, with one call of the batch norm in it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = layer()

        def forward(self, x):
            y = self.block(x)
            return self.block(y) if y.sum() > 0 else y

    plain = Twice().double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("block.1", "relu", False)]
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def test_batch_norm_that_an_untraced_container_may_call_too():
    class Reaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ByValue()

        def forward(self, x):
            return self.inner(x) + torch.relu(self.inner.bn(x))

    plain = Reaches().double()
    fused, report = fuse_separately(plain)
    assert ("inner.bn", "inner runs its own forward, which may call it too") in report.refused
    assert_same_results(fused, plain)


def test_plain_references_to_a_traced_module_stay_valid():
    """An untraced forward may hold its children in a list: they are still the same objects."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = layer()
            self.blocks = [self.block]

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if x.sum() > -1e9 else x
            return x

    plain = Lists().double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1
    assert fused.blocks[0] is fused.block
    assert_trains_alike(fused, plain, [images(seed) for seed in range(3)])


def targets(module):
    return [(node.op, node.target) for node in module.graph.nodes if node.op != "placeholder"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copied_and_pickled(duplicate):
    model = build("resnet")
    model.layer1[0].unused = nn.Linear(2, 3)
    fused, _ = fuse_batchnorm_act(model)
    fused.layer1.eval()
    twin = duplicate(fused)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not twin.layer1.training
    assert twin.layer2.training
    assert targets(twin) == targets(fused)
    own = duplicate is not copy.copy
    assert (twin.fc.weight is not fused.fc.weight) is own
    with torch.no_grad():
        torch.testing.assert_close(twin(images(0)), fused(images(0)), **TOLERANCE)
    if own:
        separate, _ = fuse_separately(model)
        separate.load_state_dict(twin.state_dict())
        twin.train(), separate.train()
        assert_trains_alike(twin, separate, [images(1)])


def hook(module, args, output):
    return 2 * output


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_are_copied_and_pickled(duplicate):
    model = build("resnet").eval()
    model.register_forward_hook(hook)
    model.layer1.register_forward_hook(hook)
    fused, _ = fuse_batchnorm_act(model)
    torch.testing.assert_close(duplicate(fused)(images(0)), model(images(0)), **TOLERANCE)


def test_other_dtype():
    model = build("mobilenet").eval()
    expected = model(images(0))
    fused = copy.deepcopy(fuse_batchnorm_act(model)[0]).float()
    assert next(model.parameters()).dtype == torch.float64
    # Some dozen layers in float32, u = 6e-8, for outputs around 1.
    torch.testing.assert_close(fused(images(0).float()).double(), expected, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(fused).to("meta")(images(0).to("meta")).shape == expected.shape


def test_compiled():
    torch._dynamo.reset()
    plain = build("resnet")
    fused, _ = fuse_separately(plain)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for seed in range(2):
        torch.testing.assert_close(compiled(images(seed)), plain(images(seed)), **TOLERANCE)
