"""The cases that are measured, the suites of cases, and the fewest bytes that each must move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from . import nets

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = ("contiguous", "channels_last")
OPS = ("bn", "bn_relu", "bn_add_relu")
PASSES = ("fwd", "eval", "bwd", "fwd+bwd")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One measurement, the same for every provider."""

    shape: Shape  #: (N, C, ...)
    dtype: str = "float32"
    layout: str = "contiguous"
    op: str = "bn"
    pass_: str = "fwd"
    count: int = 1  #: number of layers of the net with this shape
    layer: str = ""  #: name of the first of them

    @property
    def group(self) -> tuple[Shape, str, str, str]:
        """Cases of one group share their tensors and the reference."""
        return self.shape, self.dtype, self.layout, self.op

    @property
    def training(self) -> bool:
        return self.pass_ != "eval"

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} {self.dtype} {self.layout} {self.op} {self.pass_}"


class Floor(NamedTuple):
    """The fewest transfers of any implementation: tensors read, tensors written, and masks (1 bit
    per element)."""

    reads: int
    writes: int
    masks: int = 0


# Forward reads x and writes y. It needs x twice, for the statistics and to normalise, but the
# second read can come from a cache. Backward reads x and dy and writes dx; the sign that ReLU needs
# follows from x. After an addition it does not: forward writes a mask of one bit per element, and
# backward writes two gradients.
_FLOORS = {
    ("bn", "fwd"): Floor(1, 1),
    ("bn", "eval"): Floor(1, 1),
    ("bn", "bwd"): Floor(2, 1),
    ("bn_relu", "fwd"): Floor(1, 1),
    ("bn_relu", "eval"): Floor(1, 1),
    ("bn_relu", "bwd"): Floor(2, 1),
    ("bn_add_relu", "fwd"): Floor(2, 1, 1),
    ("bn_add_relu", "eval"): Floor(2, 1),
    ("bn_add_relu", "bwd"): Floor(2, 2, 1),
}


def floor(op: str, pass_: str) -> Floor:
    """The floor of one call. That of fwd+bwd is the sum of its halves."""
    if pass_ != "fwd+bwd":
        return _FLOORS[op, pass_]
    return Floor(*map(sum, zip(_FLOORS[op, "fwd"], _FLOORS[op, "bwd"], strict=True)))


def bytes_floor(case: Case) -> int:
    """The fewest bytes to and from memory. Vectors (C,) are not counted."""
    f = floor(case.op, case.pass_)
    mask = math.ceil(math.prod(case.shape) / 8)
    return (f.reads + f.writes) * case.tensor_bytes + f.masks * mask


#: Tensors read and written by the two elementwise operations that make up the copy ceiling.
COPY_PASSES = {"clone": 2, "add": 3}


def ceiling(case: Case) -> tuple[str, ...]:
    """The elementwise operations that move as many tensors as the case at its floor (no masks)."""
    if case.pass_ == "fwd+bwd":
        halves = (replace(case, pass_=half) for half in ("fwd", "bwd"))
        return tuple(name for half in halves for name in ceiling(half))
    reads, writes, _ = floor(case.op, case.pass_)
    return {(1, 1): ("clone",), (2, 1): ("add",), (2, 2): ("clone", "clone")}[reads, writes]


def ceiling_bytes(case: Case) -> int:
    return sum(COPY_PASSES[name] for name in ceiling(case)) * case.tensor_bytes


class ImpossibleCase(ValueError):
    """No batch norm could run a case; the text says why, in one line."""


def check(case: Case) -> None:
    """Raises ImpossibleCase if no batch norm could run the case."""
    shape = ",".join(map(str, case.shape))
    if len(case.shape) < 2 or min(case.shape) < 1:
        raise ImpossibleCase(f"shape {shape}: needs N,C and more, all of them positive")
    if len(case.shape) > 64:
        raise ImpossibleCase(f"{len(case.shape)} dimensions: the float64 reference takes up to 64")
    if case.layout == "channels_last" and len(case.shape) not in (4, 5):
        raise ImpossibleCase(f"shape {shape}: channels_last is for 4 and 5 dimensions")
    if case.training and math.prod(case.shape) == case.shape[1]:
        raise ImpossibleCase(f"shape {shape}: one value per channel has no variance to train with")


# --- suites ---------------------------------------------------------------------------------------


def _quick(device: str, batch: int) -> list[Case]:
    half, big = ("float16", 8 * batch) if device == "cuda" else ("bfloat16", batch)
    shapes: list[Shape] = [
        (big, 64, 56, 56), (batch // 4, 64, 112, 112), (big, 128, 28, 28), (big, 256, 14, 14),
        (big, 512, 7, 7), (4096, 256),
    ]  # fmt: skip
    both = ("fwd", "bwd")
    cases = [Case(s, pass_=p) for s in shapes for p in both]
    two = (shapes[0], shapes[3])
    cases += [Case(s, layout="channels_last", pass_=p) for s in two for p in both]
    layouts = LAYOUTS if device == "cuda" else LAYOUTS[:1]
    cases += [Case(s, half, layout, pass_=p) for s in two for layout in layouts for p in both]
    cases.append(Case(shapes[0], pass_="eval"))
    cases += [Case(shapes[0], op=op, pass_=p) for op in OPS[1:] for p in both]
    return cases


def _net(name: str) -> Callable[[str, int], list[Case]]:
    def cases(device: str, batch: int) -> list[Case]:
        layers: dict[Shape, list[str]] = {}
        for path, shape in nets.batch_norm_inputs(name, batch):
            layers.setdefault(shape, []).append(path)
        return _product((s, {"count": len(p), "layer": p[0]}) for s, p in layers.items())

    return cases


def _shapes(make: Callable[[int], Iterable[Shape]]) -> Callable[[str, int], list[Case]]:
    return lambda device, batch: _product((s, {}) for s in make(batch))


def _product(shapes: Iterable[tuple[Shape, dict[str, Any]]]) -> list[Case]:
    return [Case(s, pass_=p, **fields) for s, fields in shapes for p in ("fwd", "bwd")]


def _1d(n: int) -> list[Shape]:
    flat: list[Shape] = [(n, 1024), (32 * n, 256), (1024 * n, 64)]
    return [*flat, (n, 64, 1024), (n, 256, 256), (n, 512, 4096)]


def _3d(n: int) -> list[Shape]:
    video = [(n // 4, 64, 8, 56, 56), (n // 4, 128, 4, 28, 28), (n // 4, 512, 1, 7, 7)]
    unet = [(n // 16, 32, 64, 64, 64), (n // 16, 128, 16, 16, 16)]
    return [*video, *unet]


def _mixed(device: str, batch: int) -> list[Case]:
    """The shapes for tuning kernels: large, small, thin and odd, 2-D to 5-D, all layouts."""
    n = batch
    shapes: list[Shape] = [
        (n, 64, 56, 56), (n // 4, 64, 112, 112), (n, 256, 14, 14), (2 * n, 512, 7, 7),
        (4 * n, 16, 32, 32), (8 * n, 3, 32, 32), (128 * n, 256), (2048 * n, 64),
        (n // 2, 128, 8, 16, 16), (2, 8, 4, 4), (1, 64, 1024, 1024),
    ]  # fmt: skip
    half = "float16" if device == "cuda" else "bfloat16"
    return [
        Case(shape, dtype, layout, pass_=p)
        for dtype in ("float32", half)
        for layout in LAYOUTS
        for shape in shapes
        if layout == "contiguous" or len(shape) > 3
        for p in ("fwd", "bwd", "eval")
    ]


def _fused(device: str, batch: int) -> list[Case]:
    """Batch norm with activation, and with addition and activation, in all stages of a ResNet."""
    n = batch
    shapes: list[Shape] = [
        (n, 64, 56, 56), (n, 256, 56, 56), (n // 4, 64, 112, 112), (n, 128, 28, 28),
        (n, 256, 14, 14), (n, 512, 7, 7),
    ]  # fmt: skip
    half = "float16" if device == "cuda" else "bfloat16"
    return [
        Case(shape, dtype, layout, op, p)
        for dtype in ("float32", half)
        for layout in LAYOUTS
        for shape in shapes
        for op in OPS[1:]
        for p in ("fwd+bwd", "eval")
    ]


NET_SUITES = ("resnet50", "mobilenet_v2", "densenet121")
#: name: (device, batch) -> cases
SUITES: dict[str, Callable[[str, int], list[Case]]] = {
    "quick": _quick,
    **{name: _net(name) for name in NET_SUITES},
    "mixed": _mixed,
    "fused": _fused,
    "1d": _shapes(_1d),
    "3d": _shapes(_3d),
    "sweep-batch": _shapes(lambda n: [(1 << i, 64, 56, 56) for i in range(n.bit_length() + 1)]),
    "sweep-channels": _shapes(lambda n: [(n, 1 << i, 28, 28) for i in range(2, 12)]),
    "sweep-spatial": _shapes(lambda n: [(n, 64, s, s) for s in (1, 2, 4, 7, 14, 28, 56, 112)]),
}


def suite(name: str, device: str, batch: int) -> list[Case]:
    return SUITES[name](device, batch)


def expand(
    cases: Iterable[Case],
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
    ops: Sequence[str] = (),
    passes: Sequence[str] = (),
) -> list[Case]:
    """Cases with these dtypes, layouts, operations and passes; an empty list keeps those of the
    cases. No case comes twice, and cases of one group are adjacent."""
    found: dict[tuple[Shape, str, str, str], dict[Case, None]] = {}
    for case in cases:
        for dtype in dtypes or [case.dtype]:
            for layout in layouts or [case.layout]:
                for op in ops or [case.op]:
                    for pass_ in passes or [case.pass_]:
                        new = replace(case, dtype=dtype, layout=layout, op=op, pass_=pass_)
                        found.setdefault(new.group, {})[new] = None
    return [case for group in found.values() for case in group]
