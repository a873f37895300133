"""convert_batchnorm and revert_batchnorm: what is replaced, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnorm_ext.convert import convert_batchnorm, revert_batchnorm
from tests.common.nets import NETS
from tests.common.twins import FLOAT64, NATIVE, NATIVE_LAZY, OURS, OURS_LAZY, assert_same

pytestmark = pytest.mark.usefixtures("no_stray_warnings")

PAIRS = [*zip(NATIVE.values(), OURS.values(), strict=True)]
LAZY_PAIRS = [*zip(NATIVE_LAZY.values(), OURS_LAZY.values(), strict=True)]


def net_twins(name="resnet", seed=0):
    torch.manual_seed(seed)
    native = NETS[name]().double()
    return convert_batchnorm(copy.deepcopy(native)), native


def images(seed=1, count=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator, dtype=torch.float64)


def norm_types(net):
    return {type(m) for m in net.modules() if isinstance(m, _BatchNorm)}


@pytest.mark.parametrize("name", NETS)
def test_every_batch_norm_of_a_net_is_replaced_and_nothing_else(name):
    net = NETS[name]()
    before = {path: type(module) for path, module in net.named_modules()}
    assert convert_batchnorm(net) is net
    expected = dict(PAIRS)
    after = {path: type(module) for path, module in net.named_modules()}
    assert after == {path: expected.get(cls, cls) for path, cls in before.items()}
    assert norm_types(net) <= set(OURS.values())


@pytest.mark.parametrize("name", NETS)
def test_revert_gives_plain_native_back(name):
    net = NETS[name]()
    before = {path: type(module) for path, module in net.named_modules()}
    assert revert_batchnorm(convert_batchnorm(net)) is net
    assert {path: type(module) for path, module in net.named_modules()} == before


@pytest.mark.parametrize(("native", "ours"), PAIRS + LAZY_PAIRS)
def test_module_itself(native, ours):
    module = native() if (native, ours) in LAZY_PAIRS else native(3)
    converted = convert_batchnorm(module)
    assert type(converted) is ours
    assert type(revert_batchnorm(converted)) is native


@pytest.mark.parametrize("convert", [convert_batchnorm, revert_batchnorm])
@pytest.mark.parametrize("wrong", [{"weight": 1}, None, nn.BatchNorm2d])
def test_anything_but_a_module_is_refused(convert, wrong):
    with pytest.raises(TypeError, match=rf"{convert.__name__} expects a torch\.nn\.Module"):
        convert(wrong)


@pytest.mark.parametrize("name", NETS)
def test_tensors_are_the_very_same_objects(name):
    net = NETS[name]()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    order = [path for path, _ in net.named_parameters()]
    modules = {path: module for path, module in net.named_modules()}  # noqa: C416
    for change in (convert_batchnorm, revert_batchnorm):
        change(net)
        now = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        assert now.keys() == tensors.keys()
        assert all(now[path] is tensors[path] for path in tensors)
        assert [path for path, _ in net.named_parameters()] == order
        assert all(modules[path] is module for path, module in net.named_modules())


@pytest.mark.parametrize("name", NETS)
def test_converted_net_trains_as_native(name):
    """float64, so that only a difference in what is computed can show: 5 steps of two nets that
    differ by u = 1.1e-16 relative per operation stay within a growth of 1e6 of each other."""
    ours, native = net_twins(name)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (ours, native)
    ]
    for step in range(5):
        x, target = images(step), torch.arange(4)
        for net, optimizer in zip((ours, native), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), target).backward()
            optimizer.step()
    tolerance = {"rtol": 0.0, "atol": 1e-10}
    assert_same(dict(ours.state_dict()), dict(native.state_dict()), **tolerance)
    ours.eval(), native.eval()
    torch.testing.assert_close(ours(images(9)), native(images(9)), **tolerance)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_conversion_in_the_middle_of_training(optimizer_class):
    """The optimizer was built before and goes on: its state belongs to the same parameters."""
    torch.manual_seed(0)
    native = NETS["resnet"]().double()
    changing = copy.deepcopy(native)
    kwargs = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    nets = (changing, native)
    optimizers = [optimizer_class(net.parameters(), lr=0.01, **kwargs) for net in nets]
    for step in range(6):
        if step == 2:
            convert_batchnorm(changing)
        if step == 4:
            revert_batchnorm(changing)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images(step)), torch.arange(4)).backward()
            optimizer.step()
    parameters = list(changing.parameters())
    assert list(optimizers[0].state) == parameters
    # Adam divides by the root of squared gradients, so an entry whose true gradient is nearly
    # zero magnifies rounding: 1e-16 / 1e-8 (its eps) times lr 0.01 per step = 1e-10.
    assert_same(dict(changing.state_dict()), dict(native.state_dict()), rtol=0.0, atol=6 * 1e-10)


def test_converting_and_reverting_changes_no_bit():
    """Three steps natively, with a round trip between them, equal three steps without it."""
    torch.manual_seed(0)
    plain = NETS["mobilenet"]().double()
    tripped = copy.deepcopy(plain)
    for net in (plain, tripped):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images(step)), torch.arange(4)).backward()
            optimizer.step()
            if net is tripped:
                revert_batchnorm(convert_batchnorm(net))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tripped.state_dict()[name]), name


@pytest.mark.parametrize("name", NETS)
def test_checkpoints_load_both_ways(name):
    ours, native = net_twins(name, seed=0)
    ours(images())
    native.load_state_dict(ours.state_dict(), strict=True)
    other, _ = net_twins(name, seed=1)
    other.load_state_dict(native.state_dict(), strict=True)
    for net in (ours, native, other):
        net.eval()
    torch.testing.assert_close(other(images(2)), ours(images(2)), **FLOAT64)
    torch.testing.assert_close(native(images(2)), ours(images(2)), **FLOAT64)
    assert list(ours.state_dict()) == list(native.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_net_can_be_copied_and_pickled(duplicate):
    ours, _ = net_twins()
    twin = duplicate(ours)
    assert norm_types(twin) == {OURS[2]}
    assert torch.equal(twin(images()), ours(images()))
    assert norm_types(revert_batchnorm(twin)) == {nn.BatchNorm2d}
    assert norm_types(ours) == {OURS[2]}


def test_shared_modules_stay_shared():
    norm = nn.BatchNorm2d(3)
    net = nn.Module()
    net.first = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    net.second = nn.ModuleDict({"norm": norm, "again": norm})
    net.unregistered = [norm]  # a plain list is no child, and still the same object
    convert_batchnorm(net)
    assert type(net.first[1]) is OURS[2]
    assert net.first[1] is net.second["norm"] is net.second["again"] is net.unregistered[0]
    assert sum(1 for _ in net.modules()) == 5
    revert_batchnorm(net)
    assert type(net.first[1]) is nn.BatchNorm2d
    assert net.first[1] is net.second["again"] is net.unregistered[0]


def test_shared_parameters_stay_shared():
    """Two batch norms with one weight (tied) are two modules with one Parameter afterwards."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[1].weight = net[0].weight
    convert_batchnorm(net)
    assert net[0].weight is net[1].weight
    assert len(list(net.parameters())) == 3


def test_children_of_containers_of_every_kind():
    net = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2))]),
            "none": nn.Sequential(nn.Identity()),
            "cube": nn.BatchNorm3d(2),
        }
    )
    net.register_module("absent", None)
    convert_batchnorm(net)
    assert norm_types(net) == set(OURS.values())
    assert list(net) == ["list", "none", "cube", "absent"]


def test_converted_ones_are_left():
    net = nn.Sequential(OURS[1](2), nn.BatchNorm1d(2))
    first, second = net
    convert_batchnorm(convert_batchnorm(net))
    assert net[0] is first
    assert net[1] is second
    assert norm_types(net) == {OURS[1]}


def test_lazy_net_converts_before_its_first_call():
    def build():
        layers = (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyBatchNorm1d())
        return nn.Sequential(*layers).double()

    native, ours = build(), convert_batchnorm(build())
    assert [type(ours[i]) for i in (1, 3)] == [OURS_LAZY[2], OURS_LAZY[1]]
    for net in (native, ours):
        torch.manual_seed(1)
        net(images())
    assert [type(ours[i]) for i in (1, 3)] == [OURS[2], OURS[1]]
    assert_same(dict(ours.state_dict()), dict(native.state_dict()))


def test_lazy_modules_revert_before_and_after_their_first_call():
    net = convert_batchnorm(nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()).double())
    net[0](images())
    revert_batchnorm(net)
    assert [type(module) for module in net] == [nn.BatchNorm2d, nn.LazyBatchNorm2d]
    net(images())
    assert [type(module) for module in net] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_a_forward_that_somebody_replaced_for_all_is_kept(monkeypatch):
    original = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: original(self, x) + 100)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(2), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="BatchNorm2d: 0$"):
        convert_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d
    assert type(net[2]).__module__ == "bnorm_ext.modules"
    assert net[0](torch.randn(4, 3, 2, 2)).mean() > 90
