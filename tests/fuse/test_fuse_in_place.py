"""Additions and other operations in place: which of them fuse_batchnorm_act refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from tests.common.fuse_nets import TOLERANCE, Net, check, fuse_separately, inputs

INTO = {
    "input": (lambda net, z, x: x, "input of the model"),
    "view": (lambda net, z, x: (x * 1).view(x.shape), "share memory"),
    "chunk": (lambda net, z, x: torch.cat([x, x], 1).chunk(2, 1)[0], "share memory"),
    "slice": (lambda net, z, x: torch.cat([x, x])[:4], "share memory"),
    "dropout": (lambda net, z, x: net.drop(x), "share memory"),
    "hooked layer": (lambda net, z, x: net.hooked(x), "share memory"),
}


@pytest.mark.parametrize("target", INTO)
def test_addition_into_what_may_be_seen_elsewhere(target):
    make, words = INTO[target]

    def body(net, z, x):
        shortcut = make(net, z, x)
        y = net.bn(z)
        shortcut += y
        return torch.relu(shortcut)

    plain = Net(body).double()
    plain.drop, plain.hooked = nn.Dropout(0.0), nn.AvgPool2d(1)
    plain.hooked.register_forward_hook(lambda module, arguments, y: arguments[0])
    net, report = fuse_separately(plain)
    assert report.fused == []
    assert len(report.refused) == 1
    assert words in report.refused[0][1]
    ours = inputs()[0]
    native = ours.clone()
    with torch.no_grad():
        torch.testing.assert_close(net(ours), plain(native), **TOLERANCE)
    torch.testing.assert_close(ours, native, **TOLERANCE)  # changed alike


def test_addition_into_a_tensor_that_is_used_elsewhere():
    def body(net, z, x):
        shortcut = x * 2
        before = shortcut.view(-1)
        shortcut += net.bn(z)
        # Means: gradients of the order of 1, which the tolerance is for.
        return torch.relu(shortcut).mean() + before.mean()

    check(body, [], [("bn", "used elsewhere")])


def test_addition_into_a_tensor_of_its_own_is_fused():
    def body(net, z, x):
        shortcut = x * 2
        shortcut += net.bn(z)
        return torch.relu(shortcut)

    check(body, ["bn"], [])


def test_input_changed_in_place_before_the_addition():
    """Moving the batch norm to where the addition is would normalise the changed input. Without
    gradients: autograd refuses such a net."""

    def body(net, z, x):
        y = net.bn(z)
        z.mul_(2)
        return torch.relu(y + z)

    plain = Net(body).double()
    net, report = fuse_separately(plain)
    assert report.fused == []
    assert [name for name, _ in report.refused] == ["bn"]
    assert "mul_ may change its input in place" in report.refused[0][1]
    with torch.no_grad():
        for x in inputs():
            torch.testing.assert_close(net(x), plain(x), **TOLERANCE)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, other):
        y = self.bn(x)
        other.mul_(2)
        return torch.relu(y + x)


def test_inputs_that_are_one_tensor():
    plain, x = TwoInputs().double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    net, report = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(plain), (x, x))
    assert report.fused == []
    assert "mul_ may change its input in place" in report.refused[0][1]
    a, b = x.clone(), x.clone()
    torch.testing.assert_close(net(a, a), plain(b, b), **TOLERANCE)


CHANGES = {
    "method": lambda net, v: v.mul_(2),
    "function": lambda net, v: F.relu(v, True),
    "module": lambda net, v: net.inplace(v),
    "operator": lambda net, v: torch.ops.aten.mul_(v, 2),
    "item": lambda net, v: v.__setitem__((0, 0), 1.0),
    "out": lambda net, v: torch.neg(net.offset, out=v[0, 0, 0, :1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_view_of_the_input_changed_in_place(change):
    def body(net, z, x):
        view = z[1:]
        y = net.bn(z)
        CHANGES[change](net, view)
        return torch.relu(y + x)

    plain = Net(body).double()
    plain.inplace = nn.ReLU(inplace=True)
    net, report = fuse_separately(plain)
    assert report.fused == []
    assert "may change its input in place" in report.refused[0][1]
    with torch.no_grad():
        for x in inputs():
            torch.testing.assert_close(net(x), plain(x), **TOLERANCE)


@pytest.mark.parametrize("act", [torch.relu, F.silu])
def test_residual_changed_in_place_before_the_addition(act):
    """The fused call is where the addition was, so it sees the change."""

    def body(net, z, x):
        y = net.bn(z)
        shortcut = x * 2
        shortcut.mul_(3)
        return act(y + shortcut)

    check(body, ["bn"], [])


def test_residual_changed_in_place_afterwards():
    """Backward of silu and hardswish reads the residual: with relu, all is fused."""

    def body(act):
        def run(net, z, x):
            shortcut = x * 2
            y = act(net.bn(z) + shortcut)
            shortcut.mul_(3)
            return y + shortcut

        return run

    check(body(torch.relu), ["bn"], [])
    for act in (F.silu, F.hardswish):
        name = act.__name__
        words = f"without {name}: mul_ may change the residual in place afterwards"
        net = check(body(act), ["bn"], [("bn", words)])
        assert name in [node.name for node in net.fused_graph.nodes]


def test_residual_changed_in_place_after_an_activation_in_place():
    """The activation is in place on the sum, not on the residual; what follows is."""

    def body(net, z, x):
        shortcut = x * 2
        y = net.bn(z)
        y += shortcut
        y = F.silu(y, inplace=True)
        shortcut.mul_(3)
        return y + shortcut

    words = "without silu: mul_ may change the residual in place afterwards"
    check(body, ["bn"], [("bn", words)])


def test_output_changed_in_place_afterwards():
    def body(net, z, x):
        shortcut = x * 2
        y = net.bn(z)
        y += shortcut
        y = F.silu(y)
        y += 1
        return y * shortcut

    check(body, ["bn"], [])
