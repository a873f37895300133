"""What the property-based tests draw: shapes, memory layouts, dtypes, values, whole calls.

A draw is a small frozen dataclass, whose repr is the report of a failure, and from which the same
tensors can be built any number of times. Values come from a seed: hypothesis would take longer to
draw them one by one than the test takes. Tensors have at most `MOST` elements, also in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.common.cases import DTYPES, accumulation_type, generator
from tests.common.fused_cases import ACTS

MOST = 4096
DEFAULT_EPS = 1e-5
REFUSED_DTYPES = [
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.complex128,
]  # fmt: skip

# ---- Layouts in memory --------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Where the elements of a tensor lie in memory."""

    order: tuple[int, ...] = ()  # dimensions from the outermost to the innermost; (): as they are
    offset: int = 0  # elements in front of the first one
    gap: int = 1  # distance of neighbours in the innermost dimension
    repeated: tuple[int, ...] = ()  # dimensions of stride 0
    sliding: bool = False  # all strides 1: neighbours overlap
    sign: str = "plain"  # "negated", "imaginary": stored with the opposite sign; "real": in pairs

    def of(self, values: Tensor) -> Tensor:
        """A tensor of this layout with these values; where elements share memory, with a part of
        them."""
        shape = values.shape
        if self.sliding and values.numel() > 0:
            length = max(1, sum(shape) - len(shape) + 1)
            memory = values.flatten()[:1].expand(length).clone()
            count = min(length, values.numel())
            memory[:count] = values.flatten()[:count]
            signed = self._signed(memory)
            return signed.as_strided(shape, [signed.stride(0)] * len(shape))
        for d in self.repeated:
            values = values.narrow(d, 0, min(1, shape[d]))
        order = [d for d in self.order if d < values.dim()] or list(range(values.dim()))
        room = torch.empty(self.offset + values.numel() * self.gap, dtype=values.dtype)
        room = room[self.offset :][:: self.gap][: values.numel()]
        permuted = room.view([values.shape[d] for d in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        t = permuted.permute(back).copy_(values)
        return self._signed(t).expand(shape)

    def _signed(self, t: Tensor) -> Tensor:
        # Torch has complex forms of these two only.
        if self.sign == "plain" or t.dtype not in (torch.float32, torch.float64):
            return t
        if self.sign == "negated":
            return torch._neg_view(t.neg_())
        zeros = torch.zeros_like(t)
        if self.sign == "real":
            return torch.complex(t, zeros).conj().real
        return torch.complex(zeros, -t).conj().imag


PLAIN = View()
SIGNS = ["plain", "plain", "plain", "negated", "imaginary", "real"]


@st.composite
def views(draw: st.DrawFn, rank: int, overlapping: bool = True) -> View:
    if draw(st.integers(0, 2)) == 0:
        return PLAIN
    sliding = overlapping and draw(st.integers(0, 15)) == 15
    repeated = overlapping and draw(st.integers(0, 7)) == 7
    order: Sequence[int] = range(rank)
    if rank > 2:
        channels_last = [0, *range(2, rank), 1]
        order = draw(st.sampled_from([order, channels_last]) | st.permutations(order))
    elif rank == 2:
        order = draw(st.permutations(order))
    return View(
        tuple(order),
        draw(st.integers(0, 5)),
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        tuple(draw(st.sets(st.integers(0, rank - 1), max_size=2))) if repeated else (),
        sliding,
        draw(st.sampled_from(SIGNS)),
    )


# ---- Shapes and values --------------------------------------------------------------------------

SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 64, 67, 127, 128, 257, 521]


@st.composite
def shapes(
    draw: st.DrawFn, least_rank: int = 2, most_rank: int = 5, empty: bool = True, most: int = MOST
) -> Any:
    """0 and 1 in every dimension, powers of two, primes, and neighbours of both."""
    rank = draw(st.sampled_from([r for r in (4, 2, 3, 5) if least_rank <= r <= most_rank]))
    left, shape = most, []
    for _ in range(rank):
        size = draw(st.sampled_from([s for s in SIZES if s <= left]))
        left //= size
        shape.append(size)
    # Small dimensions first would leave the last ones no more than 1.
    shape = list(draw(st.permutations(shape)))
    if empty and draw(st.integers(0, 15)) == 15:
        shape[draw(st.integers(0, rank - 1))] = 0
    return tuple(shape)


#: Name -> values made of standard normal ones, which are float64.
ORDINARY = {
    "normal": lambda v: v,
    "shifted": lambda v: 3 * v - 5,
    "two values": lambda v: torch.where(v > 0, 0.3, -0.1),
    "constant": lambda v: torch.full_like(v, 0.7),
    "zero": lambda v: torch.zeros_like(v),
}
HARD = {
    "mean 1e3": lambda v: v + 1e3,
    "small": lambda v: v * 1e-6,
    "large": lambda v: v * 1e3,
    "outlier": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) % 97 == 11, 1e4, v),
}
EXTREME = {
    "subnormal": lambda v: v * 1e-41,
    "1e30": lambda v: v * 1e30,
    "inf": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) % 97 == 11, torch.inf, v),
    "-inf": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) % 97 == 5, -torch.inf, v),
    "nan": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) % 97 == 11, torch.nan, v),
}
VALUES = {**ORDINARY, **HARD, **EXTREME}


@dataclass(frozen=True)
class Draw:
    """A tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    view: View = PLAIN
    values: str = "normal"
    seed: int = 0

    def build(self, positive: bool = False) -> Tensor:
        v = torch.randn(self.shape, generator=generator(self.seed), dtype=torch.float64)
        v = VALUES[self.values](v)
        v = v.abs() + 0.1 if positive else v
        return self.view.of(v.to(self.dtype))


def seeds() -> Any:
    return st.integers(0, 999)


# ---- Calls --------------------------------------------------------------------------------------

VECTORS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class Call:
    """The arguments of `bnorm_ext.batch_norm`, and the gradient of its result."""

    x: Draw
    dy: Draw
    running_mean: Draw | None = None
    running_var: Draw | None = None
    weight: Draw | None = None
    bias: Draw | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = DEFAULT_EPS
    counter: int | None = None
    act: str | None = None
    residual: Draw | None = None

    def tensor(self, name: str) -> Tensor | None:
        drawn: Draw | None = getattr(self, name)
        return None if drawn is None else drawn.build(positive=name == "running_var")


@st.composite
def vectors(draw: st.DrawFn, C: int, dtype: torch.dtype, values: Sequence[str], **view: Any) -> Any:
    return Draw((C,), dtype, draw(views(1, **view)), draw(st.sampled_from(values)), draw(seeds()))


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    shape: Any = None,
    values: Sequence[str] = tuple(ORDINARY),
    dtypes: Sequence[torch.dtype] = tuple(DTYPES),
    empty: bool = True,
    fused: bool = True,
    overlapping_buffers: bool = True,
) -> Call:
    """Calls that are right in ranks, sizes and dtypes."""
    shape = draw(shapes(empty=empty) if shape is None else shape)
    if not empty and math.prod(shape) == shape[1]:
        shape = (2, *shape[1:])  # more than one value per channel
    rank, C = len(shape), shape[1]
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from([dtype, accumulation_type(dtype)]))
    training = draw(st.booleans())

    def tensor(names: Sequence[str]) -> Draw:
        return Draw(shape, dtype, draw(views(rank)), draw(st.sampled_from(names)), draw(seeds()))

    def vector(names: Sequence[str], overlapping: bool = True) -> Draw:
        return draw(vectors(C, kind, names, overlapping=overlapping))

    buffers = not training or draw(st.integers(0, 3)) > 0
    given = {
        name: vector(["normal", "shifted", "zero"], overlapping_buffers) if buffers else None
        for name in VECTORS[:2]
    }
    for name in VECTORS[2:]:
        given[name] = vector(["normal", "shifted"]) if draw(st.integers(0, 3)) > 0 else None
    counter = draw(st.sampled_from([None, 0, 1, 7])) if training else None
    momenta = [0.1, 1.0, 0.0, 0.5, -0.3, 1.7]
    act = draw(st.sampled_from([None, *ACTS])) if fused else None
    return Call(
        tensor(values),
        tensor(["normal", "shifted", "constant"]),
        **given,
        training=training,
        momentum=draw(st.sampled_from([*momenta, None] if counter is not None else momenta)),
        eps=draw(st.sampled_from([DEFAULT_EPS, 1e-3, 1.0])),
        counter=counter,
        act=act,
        residual=tensor(["normal", "shifted"]) if fused and draw(st.booleans()) else None,
    )
