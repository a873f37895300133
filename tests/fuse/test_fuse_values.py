"""Classes, None and dictionaries: what a forward may ask of values and modules without a call that
tracing would see."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext.fuse import FusedModule
from bnorm_ext.fuse.fused_module import _FUSION
from tests.common.fuse_nets import (
    Around,
    Inner,
    assert_same_results,
    fuse_separately,
    images,
    layer,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x):
        return self.layer(x)


def is_block(module):
    return type(module) is Block


ASKING = {
    "is": lambda child: type(child) is Block,
    "==": lambda child: type(child) == Block,  # noqa: E721
    "in": lambda child: type(child) in (Block, nn.Identity),
    "dictionary": lambda child: {Block: True}.get(type(child), False),
    "__class__": lambda child: child.__class__ is Block,
    "helper": is_block,
}


@pytest.mark.parametrize("asked", ASKING)
@pytest.mark.parametrize("optional", [False, True])
def test_exact_types_of_children(asked, optional):
    asks = ASKING[asked]

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), nn.Sequential(Block()), Block()])

        def run(self, x):
            for child in self.blocks:
                x = child(x) if asks(child) else child(x) * 3
            return x

        def forward(self, x):
            return self.run(x)

    class Optional(Asks):
        def forward(self, x, mask=None):
            return self.run(x)

    plain = nn.Sequential((Optional if optional else Asks)(), layer()).double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1  # that of the layer
    assert any("asks for exact types" in reason for _, reason in report.not_traced)
    assert not any(isinstance(module, FusedModule) for module in fused[0].modules())
    assert_same_results(fused, plain)


def test_own_type_and_names_of_types_are_no_question():
    class Own(Inner):
        def do(self, x):
            return x * len(type(self).__name__) * len(self.conv.__class__.__name__)

    plain = Around(Own()).double()
    fused, report = fuse_separately(plain)
    assert report.not_traced == []
    assert_same_results(fused, plain)


@pytest.mark.parametrize("question", ["type(x) is", "type(x).__name__"])
def test_exact_type_of_the_input(question):
    class Asks(Inner):
        def do(self, x):
            return x * 2 if type(x) is torch.Tensor else x

    class AsksForName(Inner):
        def do(self, x):
            return x * 2 if type(x).__name__ == "Tensor" else x

    plain = Around((Asks if question == "type(x) is" else AsksForName)()).double()
    fused, report = fuse_separately(plain)
    assert report.not_traced[0][0] == "inner"
    assert "the exact type" in report.not_traced[0][1]
    assert_same_results(fused, plain)


class MayBeNone(Inner):
    """Not traced, and without a result now and then."""

    def forward(self, x):
        if x.sum() > 0:
            return None
        return super().forward(x)


def name_it(child, x):
    y = child(x)
    if y is None:
        return x
    return y


def go_on(child, x):
    y = child(x)
    if y is not None:
        y = y * 2
        y = y + 1
    return x if y is None else y


def at_once(child, x):
    return x if child(x) is None else x * 2


def walrus(child, x):
    return x if (y := child(x)) is None else y


def as_value(child, x):
    y = child(x)
    absent = y is None
    return x if absent else y


@pytest.mark.parametrize("way", [name_it, go_on, at_once, walrus, as_value])
def test_results_that_may_be_none(way):
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.layer = MayBeNone(), layer()

        def forward(self, x):
            return self.layer(way(self.child, x))

    plain = nn.Sequential(Asks(), layer()).double().eval()
    fused, report = fuse_separately(plain)
    reasons = dict(report.not_traced)
    assert "is None" in reasons["0"]
    assert len(report.fused) == 4
    for seed in range(4):
        for x in (images(seed), images(seed) - 1, images(seed) + 1):
            torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-10)


def test_arguments_and_results_that_are_never_none_are_no_question():
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.extra = layer(), None

        def forward(self, x, skip):
            if skip is not None:
                x = x + skip
            if self.extra is not None:
                x = self.extra(x)
            return self.layer(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.joins = layer(), Joins()

        def forward(self, x):
            y = self.first(x)
            z = None
            if z is None:
                z = self.joins(y, x)
            return self.joins(z, None)

    plain = Net().double()
    fused, report = fuse_separately(plain)
    assert report.not_traced == []
    assert_same_results(fused, plain)


class TakesDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, batch):
        return {"out": self.layer(batch["image"]) * batch["more"][0]}


KINDS = {
    "dict": (dict, True),
    "OrderedDict": (OrderedDict, False),  # its order and methods may differ
    "UserDict": (UserDict, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_of_tensors(kind, monkeypatch):
    make, runs_graph = KINDS[kind]
    plain = TakesDictionary().double()
    example = {"image": images(0), "more": [images(1)]}
    fused, report = fuse_separately(plain, [example])
    assert len(report.fused) == 1
    batch = make(example)
    ran = []
    program = vars(fused)[_FUSION].program
    run = program.run
    monkeypatch.setattr(program, "run", lambda *a: ran.append(a) or run(*a))
    torch.testing.assert_close(fused(batch), plain(batch), rtol=0, atol=1e-10)
    assert bool(ran) is runs_graph
    ran.clear()
    batch = make({"image": images(0), "more": [2.0]})  # no tensor
    torch.testing.assert_close(fused(batch), plain(batch), rtol=0, atol=1e-10)
    assert ran == []
    for net in (fused, plain):
        with pytest.raises(KeyError, match="more"):
            net(make({"image": images(0)}))


def test_entries_that_a_dictionary_may_lack():
    class Masked(TakesDictionary):
        def forward(self, batch):
            mask = batch.get("mask")
            y = self.layer(batch["image"])
            return y if mask is None else y * mask

    plain = Masked().double().eval()
    fused, report = fuse_separately(plain)
    assert "is None" in dict(report.not_traced)["(root)"]
    assert len(report.fused) == 1
    for batch in ({"image": images(0)}, {"image": images(0), "mask": images(1)}):
        torch.testing.assert_close(fused(batch), plain(batch), rtol=0, atol=1e-10)


def test_arguments_with_the_names_of_the_generated_code():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, module_0, input, module_1):
            return self.layer(module_0) + input * module_1

    plain = Odd().double()
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1
    x, y, z = images(0), images(1), images(2)
    for args, kwargs in (((x, y, z), {}), ((x,), {"module_1": z, "input": y})):
        expected = plain(*args, **kwargs)
        torch.testing.assert_close(fused(*args, **kwargs), expected, rtol=0, atol=1e-10)

    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, torch):
            return self.layer(torch).to("cpu")

    class HidesSelf(Hides):
        def forward(this, self):
            return this.layer(self)

    for plain, name in ((Hides().double(), "torch"), (HidesSelf().double(), "self")):
        fused, report = fuse_separately(plain)
        assert f"an argument {name}" in dict(report.not_traced)["(root)"]
        assert len(report.fused) == 1
        assert_same_results(fused, plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_children():
    plain = nn.Sequential(torch.jit.script(Block()), Block()).double()
    fused, report = bnorm_ext.fuse_batchnorm_act(plain)
    assert report.not_traced == [("0", "it is compiled by TorchScript")]
    assert len(report.fused) == 1
    tensors = [dict((*net.named_parameters(), *net.named_buffers())) for net in (fused, plain)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name] is tensors[1][name] for name in tensors[0])
    fused.eval()
    assert plain[0].training
    plain.eval()
    torch.testing.assert_close(fused(images(0)), plain(images(0)), rtol=0, atol=1e-10)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.mean((2, 3))[:, :1].expand(-1, 4))


class AsksScripted(nn.Module):
    """Reads the shape of a parameter in a scripted child."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.scripted = nn.BatchNorm2d(3), torch.jit.script(Projection())

    def forward(self, x):
        return self.scripted(torch.relu(self.bn(x))) * self.scripted.linear.weight.shape[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_child_that_is_asked():
    plain = AsksScripted().double().eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(plain)
    assert len(report.fused) == 1
    fusion = fused._bnorm_ext_fusion
    assert fusion.guard.check(fused, [None] * len(fusion.program.modules))
    torch.testing.assert_close(fused(images(0)), plain(images(0)), rtol=0, atol=1e-10)


class Scaled(nn.Module):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = layer(), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layer(x) * self.scale


class Unread(Scaled):
    """Its graph would not show that it is parametrised."""

    def forward(self, x):
        return self.layer(x)


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("cls", "factor"), [(Scaled, 2), (Unread, 1)])
def test_parametrised_root(cls, factor, when):
    parametrize = nn.utils.parametrize
    plain = cls().double().eval()
    expected = plain(images(0)) * factor
    if when == "before":
        parametrize.register_parametrization(plain, "scale", Twice())
    fused, report = fuse_separately(plain)
    assert len(report.fused) == 1
    if when == "after":
        parametrize.register_parametrization(fused, "scale", Twice())
    torch.testing.assert_close(fused(images(0)), expected, rtol=0, atol=1e-10)
    parametrize.remove_parametrizations(fused, "scale")
    assert isinstance(fused, cls)
    torch.testing.assert_close(fused.scale.item(), 2.0)
    torch.testing.assert_close(fused(images(0)), expected, rtol=0, atol=1e-10)
    bnorm_ext.revert_batchnorm(fused)
    assert type(fused) is cls
    torch.testing.assert_close(fused(images(0)), expected, rtol=0, atol=1e-10)
