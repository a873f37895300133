"""Conversion to SyncBatchNorm and back, and what it is in one process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bnorm_ext

SYNC = bnorm_ext.SyncBatchNorm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.native, self.ours = nn.BatchNorm2d(3), bnorm_ext.BatchNorm2d(3)
        self.act = bnorm_ext.BatchNormAct2d(3, act="leaky_relu", negative_slope=0.2)
        self.sync, self.flat = nn.SyncBatchNorm(3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.sync(self.act(self.ours(self.native(x))))
        return self.flat(x.flatten(2))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


CLASSES = {
    "native": nn.BatchNorm2d,
    "ours": nn.BatchNorm2d,
    "act": bnorm_ext.BatchNormAct2d,
    "sync": nn.SyncBatchNorm,
    "flat": nn.BatchNorm1d,
}


def test_converted_and_reverted() -> None:
    net = Net()
    parameters = list(net.parameters())
    state = copy.deepcopy(net.state_dict())
    assert bnorm_ext.convert_batchnorm(net, sync=True) is net
    assert {name: type(m) for name, m in net.named_children()} == dict.fromkeys(CLASSES, SYNC)
    assert (net.act.act, net.act.negative_slope) == ("leaky_relu", 0.2)
    assert (net.native.act, net.native.process_group) == ("identity", None)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0)
    bnorm_ext.revert_batchnorm(net)
    assert {name: type(m) for name, m in net.named_children()} == CLASSES
    for name, child in net.named_children():
        # Neither more attributes nor fewer than a new one has.
        new = CLASSES[name](3) if name != "act" else bnorm_ext.BatchNormAct2d(3)
        assert vars(child).keys() == vars(new).keys(), name


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process(training: bool) -> None:
    """Without a process group each is the local batch norm."""
    plain, net = Net(), Net()
    bnorm_ext.convert_batchnorm(net, sync=True)
    plain.train(training), net.train(training)
    for _ in range(2):
        torch.testing.assert_close(net(images()), plain(images()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(net.state_dict()), dict(plain.state_dict()))


def test_copies_and_pickles() -> None:
    net = bnorm_ext.convert_batchnorm(Net(), sync=True).eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.act) is SYNC
        torch.testing.assert_close(other(images()), net(images()), rtol=0, atol=0)


def test_others_are_named() -> None:
    class Own(nn.BatchNorm2d):
        pass

    net = nn.Sequential(Own(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match=r"Own: 0.*LazyBatchNorm2d: 1"):
        bnorm_ext.convert_batchnorm(net, sync=True)
    assert [type(m).__name__ for m in net] == ["Own", "LazyBatchNorm2d", "SyncBatchNorm"]


def test_a_hand_made_one_reverts_to_torchs() -> None:
    net = nn.Sequential(SYNC(3), SYNC(3, act="relu"))
    with pytest.warns(UserWarning, match="SyncBatchNorm: 1"):
        bnorm_ext.revert_batchnorm(net)
    assert [type(m) for m in net] == [nn.SyncBatchNorm, SYNC]


def test_process_group_without_sync() -> None:
    with pytest.raises(ValueError, match="process_group is of use with sync=True only"):
        bnorm_ext.convert_batchnorm(Net(), process_group=object())


def test_a_group_that_is_given_later() -> None:
    group = object()
    net = bnorm_ext.convert_batchnorm(Net(), sync=True)
    bnorm_ext.convert_batchnorm(net, sync=True, process_group=group)
    assert all(m.process_group is group for m in net.children())
    bnorm_ext.revert_batchnorm(net)
    assert net.sync.process_group is group


def test_torchs_own_group_is_kept() -> None:
    group, other = object(), object()
    for given, expected in ((None, group), (other, other)):
        net = nn.Sequential(nn.SyncBatchNorm(3, process_group=group))
        bnorm_ext.convert_batchnorm(net, sync=True, process_group=given)
        assert net[0].process_group is expected
        bnorm_ext.revert_batchnorm(net)
        assert net[0].process_group is expected


def test_fused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    fused, report = bnorm_ext.fuse_batchnorm_act(bnorm_ext.convert_batchnorm(net, sync=True))
    assert report.fused == [("1", "relu", False)]
    torch.testing.assert_close(fused(images()), net(images()))
    # And the other way round: the graph takes the modules as they are.
    other, _ = bnorm_ext.fuse_batchnorm_act(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    bnorm_ext.convert_batchnorm(other, sync=True)
    assert type(other[0]) is SYNC
    assert (other(images()) >= 0).all()
    reverted = bnorm_ext.revert_batchnorm(other)
    assert [type(m) for m in reverted] == [nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), r"expected at least 2D input \(got 1D input\)"),
        (torch.ones(2, 0, 3), "SyncBatchNorm number of input channels should be non-zero"),
    ],
)
def test_errors_are_natives(x: torch.Tensor, message: str) -> None:
    for cls in (SYNC, nn.SyncBatchNorm):
        with pytest.raises(ValueError, match=message):
            cls(3)(x)


def test_timm() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    net = nn.Sequential(norm_act.BatchNormAct2d(3), norm_act.BatchNormAct2d(3, act_layer=nn.GELU))
    expected = net(images())
    net2 = copy.deepcopy(net)
    bnorm_ext.convert_batchnorm(net2, sync=True)
    assert all(isinstance(m, norm_act.BatchNormAct2d) for m in net2)
    torch.testing.assert_close(net2(images()), expected)
    again = pickle.loads(pickle.dumps(net2))
    assert [type(m) for m in again] == [type(m) for m in net2]
    bnorm_ext.revert_batchnorm(net2)
    assert [type(m) for m in net2] == [norm_act.BatchNormAct2d] * 2


def test_a_group_does_not_survive_pickling() -> None:
    bn = bnorm_ext.SyncBatchNorm(3, process_group=object())
    assert copy.deepcopy(bn).process_group is bn.process_group
    assert pickle.loads(pickle.dumps(bn)).process_group is not None  # not silently all ranks


def test_scripted_for_evaluation_only() -> None:
    with pytest.raises(torch.jit.Error, match="SyncBatchNorm is scripted for evaluation only"):
        torch.jit.script(bnorm_ext.SyncBatchNorm(3))(images())


def test_exported_for_evaluation() -> None:
    net = bnorm_ext.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), sync=True).eval()
    program = torch.export.export(net, (images(),))
    assert "bnorm_ext" not in program.graph_module.code
    scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(images()), net(images()))
