"""Out of memory in the middle of a call: each allocation of each call fails once, alone and with
all that follow. The error is torch's, nothing has changed, nothing is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bnorm_ext
from tests.common.failing_allocator import TEXT, every
from tests.common.ranks import Ranks, ranks

pytestmark = pytest.mark.usefixtures("one_thread")

C = 6
# The last has more channels than coefficients fit on the kernels' stack, in more than one chunk.
SHAPES = {"image": (4, C, 5, 5), "wide": (520, 1100)}
LAYOUTS = ("contiguous", "channels_last", "strided")


def bytes_of(*tensors: Tensor | None) -> list[Any]:
    """What tensors hold, and how often autograd has seen them change."""
    given = [t.detach() for t in tensors if t is not None]
    return [
        (t._version, t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()) for t in given
    ]


def input_of(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]  # every other element: the call makes a copy
    return x


class Layer:
    """A batch norm with whatever follows it, and its input."""

    def __init__(
        self,
        shape: tuple[int, ...] = SHAPES["image"],
        layout: str = "contiguous",
        dtype: torch.dtype = torch.float32,
        act: str | None = None,
        residual: bool = False,
        momentum: float | None = 0.1,
        training: bool = True,
        grad: bool = True,
    ) -> None:
        kind = bnorm_ext.BatchNormAct1d if len(shape) == 2 else bnorm_ext.BatchNormAct2d
        self.bn = kind(shape[1], momentum=momentum, act=act).train(training).requires_grad_(grad)
        self.x = input_of(shape, layout, dtype).requires_grad_(grad)
        self.residual = input_of(shape, layout, dtype).requires_grad_(grad) if residual else None
        for buffer in self.bn.buffers():
            buffer.add_(2)

    def __call__(self) -> Tensor:
        y: Tensor = self.bn(self.x, self.residual)
        return y

    def state(self) -> list[Any]:
        return bytes_of(*self.bn.buffers(), *self.bn.parameters(), self.x, self.residual)


OPTIONS: dict[str, dict[str, Any]] = {
    "training": {},
    "training, no gradients": {"grad": False},
    "evaluation": {"training": False},
    "cumulative average": {"momentum": None},
    "bfloat16": {"dtype": torch.bfloat16},
    "relu": {"act": "relu"},
    "relu, residual": {"act": "relu", "residual": True},
    "silu, residual": {"act": "silu", "residual": True},
    "evaluation, relu, residual": {"training": False, "act": "relu", "residual": True},
    "wide": {"shape": SHAPES["wide"]},
    "wide, evaluation": {"shape": SHAPES["wide"], "training": False},
    "channels_last": {"layout": "channels_last", "act": "relu", "residual": True},
    "strided": {"layout": "strided", "act": "silu", "residual": True, "momentum": None},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name):
    def make():
        layer = Layer(**OPTIONS[name])
        return layer, layer.state

    every(make, at_least=1 if "evaluation" in name else 3)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "no gradients" not in name])
def test_backward(name):
    """Accumulated gradients are autograd's, which stores those of one leaf before the next."""

    def make():
        layer = Layer(**OPTIONS[name])
        y = layer()
        dy = torch.ones_like(y)
        return (lambda: y.backward(dy)), layer.state

    every(make, at_least=3)


def test_second_derivatives():
    def make():
        layer = Layer(act="silu")
        (dx,) = torch.autograd.grad(layer().square().sum(), layer.x, create_graph=True)
        return (lambda: torch.autograd.grad(dx.square().sum(), layer.x)), layer.state

    every(make, at_least=10)


def test_counter_that_the_kernels_do_not_take():
    """The batch is counted last, in Python."""

    def make():
        layer = Layer()
        layer.bn.num_batches_tracked = layer.bn.num_batches_tracked.int()
        return layer, layer.state

    every(make, at_least=3)


def test_running_statistics_that_are_negated_views():
    """They are updated on copies, and written back after the call."""

    def make():
        layer = Layer()
        stored = torch.zeros(2, C, dtype=torch.complex64)
        mean, var = (torch.imag(t.conj()) for t in stored)
        assert mean.is_neg()
        var.fill_(1)

        def call():
            return bnorm_ext.batch_norm(layer.x, mean, var, training=True)

        return call, lambda: bytes_of(mean, var)

    every(make, at_least=5)


def test_synchronised_operators():
    ops = torch.ops.bnorm_ext

    def make():
        means, vars = (torch.rand(3, C, dtype=torch.double) for _ in range(2))
        buffers = [torch.ones(C), torch.ones(C), torch.tensor(3)]

        def call():
            counts = torch.full((3,), 5.0, dtype=torch.double)
            return ops.batch_norm_merge_stats(
                means, vars, counts, *buffers, None, 1e-5, torch.float32
            )

        return call, lambda: bytes_of(*buffers)

    every(make, at_least=3)


# ---- Several processes ---------------------------------------------------------------------------


def every_allocation_of_a_synchronised_call(rank: int, act: str, residual: bool) -> list[str]:
    """In all ranks at once, so that none waits for another."""
    options: dict[str, Any] = {"act": act, "residual": residual, "momentum": None}
    agreed = bnorm_ext.convert_batchnorm(Layer(**options).bn, sync=True)
    agreed.layer_name = "layer"

    def make() -> Any:
        torch.manual_seed(rank)
        layer = Layer(**options)
        layer.bn = bnorm_ext.convert_batchnorm(layer.bn, sync=True)
        layer.bn.layer_name = "layer"
        return layer, layer.state

    make()[0]()  # the ranks agree on the layer
    texts = every(make, at_least=6)

    def backward() -> Any:
        layer, state = make()
        y = layer()
        return (lambda: y.sum().backward()), state

    return texts + every(backward, at_least=6)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with ranks(2, tmp_path_factory.mktemp("ranks"), 20) as started:
        yield started


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
@pytest.mark.parametrize(("act", "residual"), [("identity", False), ("relu", True)])
def test_synchronised_module(group: Ranks, act: str, residual: bool) -> None:
    for texts in group(every_allocation_of_a_synchronised_call, act, residual):
        assert all(TEXT in text for text in texts)
