"""What fuse_batchnorm_act refuses, that it says why, and that the result is right all the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import TOLERANCE, Net, check, fuse_separately, layer


def test_several_users_of_the_batch_norm():
    def body(net, z, x):
        y = net.bn(z)
        return torch.relu(y) + torch.sigmoid(y)

    check(body, [], [("bn", "several users")])


def test_added_to_itself():
    def body(net, z, x):
        y = net.bn(z)
        return y + y

    check(body, [], [("bn", "several users")])


def test_several_users_of_the_sum():
    """The addition is fused nevertheless; the activation is not."""

    def body(net, z, x):
        s = net.bn(z) + x
        return torch.relu(s) * s

    net = check(body, ["bn"], [("bn", "the sum has several users")])
    assert "relu" in [node.name for node in net.fused_graph.nodes]


HOOKS = {
    "forward hooks": lambda m: m.register_forward_hook(lambda m, a, y: 2 * y),
    "forward pre hooks": lambda m: m.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "backward hooks": lambda m: m.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "backward pre hooks": lambda m: m.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_batch_norm(kind):
    check(
        lambda net, z, x: torch.relu(net.bn(z)), [], [("bn", kind)], lambda net: HOOKS[kind](net.bn)
    )


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_activation(kind):
    check(
        lambda net, z, x: net.relu(net.bn(z)),
        [],
        [("bn", f"relu has {kind}")],
        lambda net: HOOKS[kind](net.relu),
    )


def test_hooks_on_the_activation_after_an_addition():
    net = check(
        lambda net, z, x: net.relu(net.bn(z) + x),
        ["bn"],
        [("bn", "fused with its addition but without relu: the activation relu has forward hooks")],
        lambda net: HOOKS["forward hooks"](net.relu),
    )
    assert "relu" in [node.name for node in net.fused_graph.nodes]


@pytest.mark.parametrize("name", ["bn", "relu"])
def test_forward_replaced_on_the_instance(name):
    def prepare(net):
        getattr(net, name).forward = lambda x: x * 2

    check(lambda net, z, x: net.relu(net.bn(z)), [], [("bn", "was replaced")], prepare)


@pytest.mark.parametrize("act", [nn.GELU(), nn.Tanh(), nn.PReLU()])
def test_other_activations_are_none_of_ours(act):
    def prepare(net):
        net.act = act.double()

    check(lambda net, z, x: net.act(net.bn(z)), [], [], prepare)


def test_a_subclass_of_an_activation_is_none_of_ours():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    def prepare(net):
        net.act = Doubled()

    # Traced into: its relu is a function call in the graph.
    net = check(lambda net, z, x: net.act(net.bn(z)), ["bn"], [], prepare)
    assert "mul" in [node.name for node in net.fused_graph.nodes]


def test_a_computed_slope():
    def body(net, z, x):
        return F.leaky_relu(net.bn(z), x.size(0) / 10)

    check(body, [], [("bn", "slope of the activation is computed")])


def add_alpha(net, y, x):
    return torch.add(y, x, alpha=2)


NO_TENSOR_OF_THAT_SHAPE = {
    "number": (lambda net, y, x: y + 1, "no tensor but 1"),
    "size": (lambda net, y, x: y + x.size(0), "no tensor but"),
    "alpha": (add_alpha, "alpha=2"),
    "parameter": (lambda net, y, x: y + net.bias, "bias of the module"),
    "buffer": (lambda net, y, x: net.offset + y, "offset of the module"),
    "channel means": (lambda net, y, x: y + x.mean((2, 3), keepdim=True), "broadcasts: "),
    "dtype": (lambda net, y, x: y + x.to(torch.float32), "torch.float64"),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("case", NO_TENSOR_OF_THAT_SHAPE)
def test_additions_that_broadcast_or_promote(case, example):
    add, words = NO_TENSOR_OF_THAT_SHAPE[case]
    check(lambda net, z, x: F.relu(add(net, net.bn(z), x)), [], [("bn", words)], example=example)


class Untold(nn.Module):
    """Two inputs, so that no shape can be guessed."""

    def __init__(self, add):
        super().__init__()
        self.conv, self.bn, self.add = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), add

    def forward(self, x, r):
        return F.leaky_relu(self.add(self.bn(self.conv(x)), r), 0.2)


def iadd(y, r):
    y += r
    return y


def into_the_residual(y, r):
    r = r * 1
    r += y
    return r


FORMS = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": iadd,
    "r += y": into_the_residual,
}
RESIDUALS = {
    "alike": torch.randn(4, 3, 5, 6, dtype=torch.float64),
    "smaller": torch.randn(3, 1, 1, dtype=torch.float64),
    "larger": torch.randn(2, 4, 3, 5, 6, dtype=torch.float64),
    "float32": torch.randn(4, 3, 5, 6),
    "number": 0.5,
}


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("form", FORMS)
def test_unknown_shapes_are_compared_at_run_time(form, residual):
    """Where the plain net raises, the fused one raises the same."""
    plain = Untold(FORMS[form]).double()
    net, report = fuse_separately(plain)
    assert report.fused == [("bn", "leaky_relu", True)]
    r = RESIDUALS[residual]
    for training in (True, False):
        results = []
        for module in (plain.train(training), net.train(training)):
            torch.manual_seed(0)
            x = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
            try:
                y = module(x, r)
                y.square().mean().backward()
                results.append((y.dtype, y.detach(), x.grad))
            except (RuntimeError, AttributeError) as error:
                results.append((type(error), str(error).splitlines()[0]))
        expected, seen = results
        assert expected[0] == seen[0]
        if isinstance(expected[1], str):
            assert expected[1] == seen[1]
        else:
            torch.testing.assert_close(seen[1:], expected[1:], **TOLERANCE)
    assert net.bn.num_batches_tracked == plain.bn.num_batches_tracked == 1


def test_autocast_changes_dtypes_after_fusing():
    """The convolution gives bfloat16, the shortcut stays float32: promoted, as in the plain net."""
    plain = Net(lambda net, z, x: F.relu(net.bn(z) + x))
    net, report = fuse_separately(plain)
    assert len(report.fused) == 1
    x = torch.randn(4, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = plain(x), net(x)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)  # bfloat16 rounds to 2**-8


def test_example_inputs_tell_of_several_inputs():
    x = torch.empty(4, 3, 5, 6)
    _, report = fuse_batchnorm_act(Untold(FORMS["y + r"]), (x, torch.empty(3, 1, 1)))
    assert report.refused == [
        ("bn", "the addition broadcasts: [4, 3, 5, 6] and [3, 1, 1]"),
    ]
    _, report = fuse_batchnorm_act(Untold(FORMS["y + r"]), [x, x.double()])
    assert report.refused == [
        ("bn", "the addition is of torch.float32 on cpu and torch.float64 on cpu")
    ]
    _, report = fuse_batchnorm_act(Untold(FORMS["y + r"]), (x, x))
    assert report.fused == [("bn", "leaky_relu", True)]


def test_example_inputs_are_not_computed_with():
    """Shapes alone: nothing is called that could change or count anything."""
    net = Net(lambda net, z, x: F.relu(net.bn(z) + x))
    state = {name: t.clone() for name, t in net.state_dict().items()}
    calls = []
    net.conv.register_forward_hook(lambda m, a, y: calls.append("conv"))
    x = torch.ones(2, 3, 5, 6)
    fuse_batchnorm_act(net, x)
    assert calls == []
    assert torch.equal(x, torch.ones(2, 3, 5, 6))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_called_more_than_once():
    check(lambda net, z, x: torch.relu(net.bn(torch.relu(net.bn(z)))), ["bn", "bn"], [])
    # The second call would come before the first one: the running statistics say in which order.
    check(
        lambda net, z, x: net.bn(z) + net.bn(2 * z) * x,
        [],
        [("bn", "called more than once")],
    )


def named_twice(net):
    net.other = net.bn


def test_several_names():
    check(lambda net, z, x: torch.relu(net.bn(z)), ["bn"], [], named_twice)
    check(lambda net, z, x: net.bn(z) + x, [], [("bn", "bn, other")], named_twice)


def test_parameter_used_elsewhere():
    check(lambda net, z, x: torch.relu(net.bn(z)) * net.bn.weight.sum(), ["bn"], [])
    check(
        lambda net, z, x: net.bn(z) + x * net.bn.running_mean.sum(),
        [],
        [("bn", "bn.running_mean is used elsewhere")],
    )


def test_other_classes_of_batch_norm():
    class Own(nn.BatchNorm2d):
        pass

    for norm in (Own(3), nn.SyncBatchNorm(3)):
        net = nn.Sequential(norm, nn.ReLU())
        fused, report = fuse_batchnorm_act(net)
        assert report.fused == []
        assert [name for name, _ in report.refused] == ["0"]
        assert type(norm).__qualname__ in report.refused[0][1]
        assert type(fused[0]) is type(norm)


def test_lazy_batch_norm():
    net = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    fused, report = fuse_batchnorm_act(net)
    assert report.refused == [("0", "it is not initialised: call the model once before")]
    assert type(fused[0]) is bnorm_ext.LazyBatchNorm2d


@pytest.mark.parametrize("wrong", [3, {"x": torch.ones(1)}, "x", torch.ones, {torch.ones(1)}])
def test_example_inputs_of_a_wrong_kind(wrong):
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a sequence"):
        fuse_batchnorm_act(layer(), wrong)


@pytest.mark.parametrize("count", [0, 2])
def test_example_inputs_of_a_wrong_number(count):
    with pytest.raises(ValueError, match="example_inputs are not what Sequential takes"):
        fuse_batchnorm_act(layer(), [torch.ones(1)] * count)
