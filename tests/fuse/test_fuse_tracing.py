"""What fuse_batchnorm_act keeps where tracing would lose or break it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import (
    TOLERANCE,
    Around,
    ByValue,
    assert_same_results,
    assert_trains_alike,
    build,
    fuse_separately,
    images,
    layer,
)


class Views(Around):
    def forward(self, x):
        y = super().forward(x) * 1
        v = y[:, 0]
        v += 1
        v[0] = 2
        return y


def test_in_place_operators_stay_in_place():
    """torch's own tracer makes ``v += 1`` out of place: ``v`` is a view here."""
    plain = Views(nn.Identity()).double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 2
    assert_trains_alike(fused, plain, [images(seed) for seed in range(2)])
    loaded = pickle.loads(pickle.dumps(fused))
    torch.testing.assert_close(loaded(images(3)), fused(images(3)), **TOLERANCE)


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


def test_containers_can_be_called():
    """They do what they did, with the batch norms of the fused net."""
    plain = build("resnet")
    fused, _ = fuse_separately(plain)
    channels = {"stem": 3, "layer1": 8, "layer1.0": 8, "layer2.0": 8}
    for path, count in channels.items():
        x = torch.randn(2, count, 6, 6, dtype=torch.float64)
        ours, native = fused.get_submodule(path), plain.get_submodule(path)
        torch.testing.assert_close(ours(x.clone()), native(x.clone()), **TOLERANCE)


def test_a_model_without_chains_stays_what_it_is():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return self.stack(x)

    fused, report = fuse_batchnorm_act(Plain())
    assert type(fused).forward is Plain.forward
    assert type(fused.stack[1]) is bnorm_ext.BatchNorm2d
    assert report.fused == []


def test_shared_blocks():
    """One block called at two places of one graph: its batch norms are called twice."""
    block = layer()
    plain = nn.Sequential(block, nn.ReLU(), block).double()
    fused, report = fuse_separately(plain)
    assert report.fused == [("0.1", "relu", False)] * 2
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
    assert ("inner.bn", "relu", False) in report.fused
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
    return [(node.op, node.target) for node in module.fused_graph.nodes if node.op != "placeholder"]


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


def test_names_that_python_would_not_take():
    plain = nn.Sequential()
    for name in ("block1-0", "class", "0", "é x"):
        plain.add_module(name, layer())
    plain = plain.double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 4
    assert_trains_alike(fused, plain, [images(0)])
