"""The accuracy promise as measured: the worst error of ours and of native, over random cases.

python -m bench.numerics --quick

Each case has random shape, layout, magnitude, parameters, activation and data; forward and backward
are compared with float64 (promise.py). The tables have a line for each group of cases, and for each
result "ours / native": the worst errors of the group, in units of u, the unit roundoff of the
result's dtype. `beside` and `alone` are the largest shares of bounds (1) and (2) of
docs/numerics.md: the promise holds where no share is above 1. Else the cases that break it are
printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext
from bnorm_ext.activations import NAMES, compose

from . import promise
from .cases import DTYPES
from .options import Parser, names, whole
from .promise import Case, Epilogue, Results

LAYOUTS = ("contiguous", "channels_last")
#: |mean| / std of the data.
MAGNITUDES = (0.0, 1.0, 30.0, 1e4)
#: Values per channel: from, to.
COUNTS = ((2, 4), (5, 64), (65, 20000))
SHOWN = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
SLOPE = 0.1  # of leaky_relu

Function = Callable[..., Tensor]


class Drawn(NamedTuple):
    """A random case; the same one for the same seed and number."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    layout: str
    magnitude: float
    counts: tuple[int, int]
    training: bool
    act: str
    residual: bool

    def __str__(self) -> str:
        return (
            f"case {self.number}: {'x'.join(map(str, self.shape))} {self.dtype} {self.layout}, "
            f"{'training' if self.training else 'inference'}, mean / std {self.magnitude:g}, "
            f"{self.act}{' after an addition' if self.residual else ''}"
        )


def _factors(n: int) -> Iterator[int]:
    p = 2
    while p * p <= n:
        while n % p == 0:
            yield p
            n //= p
        p += 1
    if n > 1:
        yield n


def draw(seed: int, number: int, dtypes: Sequence[str], counts: Sequence[tuple[int, int]]) -> Drawn:
    rng = random.Random(seed * 1_000_003 + number)
    low, high = rng.choice(counts)
    count = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    channels = rng.choice([1, 2, 3, 5, 8, 16, 17, 33])
    while count * channels > 60_000 and channels > 1:
        channels //= 2
    sizes = [1] * rng.choice([1, 2, 3, 3, 4])  # of the samples and of each spatial dimension
    for factor in _factors(count):
        sizes[rng.randrange(len(sizes))] *= factor
    dtype = rng.choice(dtypes)
    # What 16 bits hold of a large mean leaves no deviations.
    wide = DTYPES[dtype].itemsize > 2
    return Drawn(
        number,
        (sizes[0], channels, *sizes[1:]),
        dtype,
        rng.choice(LAYOUTS) if len(sizes) in (3, 4) else "contiguous",
        rng.choice(MAGNITUDES[: None if wide else 3]),
        (low, high),
        rng.random() < 0.85,
        rng.choice(NAMES),
        rng.random() < 0.4,
    )


def _format(shape: tuple[int, ...], layout: str) -> torch.memory_format:
    if layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


def made(d: Drawn, seed: int, device: str = "cpu") -> tuple[Case, Epilogue]:
    """The tensors of a case."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + d.number)
    rng = random.Random(d.number)
    dtype, channels = DTYPES[d.dtype], d.shape[1]
    kind = rng.choice([dtype, promise.accumulation_type(dtype)])  # of parameters

    def normal(shape: tuple[int, ...], mean: float = 0, std: float = 1) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * std + mean

    def large(mean: float = 0, std: float = 1) -> Tensor:
        t = normal(d.shape, mean, std).to(dtype)
        return t.contiguous(memory_format=_format(d.shape, d.layout)).to(device)

    def vector(t: Tensor) -> Tensor:
        return t.to(kind).to(device)

    std = rng.choice([0.1, 1.0, 1.0, 10.0])
    mean = d.magnitude * std * rng.choice([-1, 1])
    x, dy = large(mean, std), large(rng.choice([0, 0, 1]))
    of_batch = 0 if d.training else mean
    case = Case(
        x,
        dy,
        vector(normal((channels,), of_batch, std)),
        vector((normal((channels,)).square() + 0.5) * std * std),
        vector(normal((channels,)).abs() + 0.1) if rng.random() < 0.9 else None,
        vector(normal((channels,))) if rng.random() < 0.9 else None,
        d.training,
        momentum=rng.choice([0.1, 0.1, 1.0, 0.3]),
    )
    e = Epilogue(large() if d.residual else None, d.act, SLOPE)
    return promise.away_from_kinks(case, e), e


def ours(x: Tensor, *given: Any, e: Epilogue) -> Tensor:
    return bnorm_ext.batch_norm(x, *given, residual=e.residual, act=e.act, negative_slope=e.slope)


def native(x: Tensor, *given: Any, e: Epilogue) -> Tensor:
    """torch's own operations, one after the other."""
    return compose(F.batch_norm(x, *given), e.residual, e.act, e.slope)


def run(function: Function, c: Case, e: Epilogue) -> Results:
    """Forward and backward; everything that came out, by name."""
    leaves = {"x": c.x, "residual": e.residual, "weight": c.weight, "bias": c.bias}
    given = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    buffers = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
    affine = (given.get("weight"), given.get("bias"))
    y = function(
        *(given["x"], *buffers, *affine, c.training, c.momentum, c.eps),
        e=e._replace(residual=given.get("residual")),
    )
    gradients = torch.autograd.grad(y, list(given.values()), c.dy)
    results = {"y": y.detach()}
    results |= {f"d{n}": t for n, t in zip(given, gradients, strict=True)}
    names = ("running_mean", "running_var")
    return results | {n: t for n, t in zip(names, buffers, strict=True) if t is not None}


class Row:
    """The worst of a group of cases."""

    def __init__(self) -> None:
        self.cases = 0
        self.worst: dict[str, tuple[float, float]] = {}
        self.beside = self.alone = 0.0

    def add(self, found: dict[str, promise.Share]) -> None:
        self.cases += 1
        for name, share in found.items():
            before = self.worst.get(name, (0.0, 0.0))
            self.worst[name] = (max(before[0], share.ours), max(before[1], share.native))
            self.beside = max(self.beside, share.beside)
            self.alone = max(self.alone, share.alone)


class Table:
    """A line for each group of cases."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: dict[tuple[str, ...], Row] = {}

    def add(self, group: tuple[str, ...], found: dict[str, promise.Share]) -> None:
        self.rows.setdefault(group, Row()).add(found)

    def lines(self) -> Iterator[str]:
        heads = (*self.columns, "cases", *SHOWN, "beside", "alone")
        yield "| " + " | ".join(heads) + " |"
        yield "|" + "---|" * len(self.columns) + "---:|" * (len(heads) - len(self.columns))
        for group, row in sorted(self.rows.items(), key=lambda item: list(map(_order, item[0]))):
            cells = [*group, str(row.cases)]
            for name in SHOWN:
                pair = row.worst.get(name)
                cells.append("-" if pair is None else f"{_short(pair[0])} / {_short(pair[1])}")
            cells += [f"{row.beside:.2f}", f"{row.alone:.2f}" if row.alone else "-"]
            yield "| " + " | ".join(cells) + " |"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


_ORDER = [*DTYPES, *LAYOUTS, *NAMES, *map("{:g}".format, MAGNITUDES)]
_ORDER += [f"{low} to {high}" for low, high in COUNTS]


def _order(cell: str) -> tuple[int, str]:
    return (_ORDER.index(cell) if cell in _ORDER else -1, cell)


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--quick", action="store_true", help="few cases: less than half a minute")
    add("--cases", type=whole(1), metavar="N", help="default: 20000, with --quick 1000")
    add("--seed", type=whole(0, 2**31), default=0)
    add("--dtype", nargs="+", metavar="D", help=f"{', '.join(DTYPES)}; default: all")
    add("--small", action="store_true", help=f"at most {COUNTS[-2][1]} values per channel")
    add("--device", default="cpu", help="default: cpu")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = parser(command or f"python -m {__package__}.numerics")
    o = p.parse_args(arguments)
    try:
        dtypes = names(o.dtype, "--dtype", tuple(DTYPES)) or list(DTYPES)
        if bnorm_ext.build_info()["cpu_capability"] is None:
            raise ValueError("BNORM_EXT_DISABLE is set: there are no kernels to measure")
        torch.empty(0, device=o.device)
    except (ValueError, RuntimeError) as error:
        p.error(str(error))
    count = o.cases or (1000 if o.quick else 20000)
    counts = COUNTS[:-1] if o.small else COUNTS
    started = time.monotonic()
    tables = (
        Table("dtype", "\\|mean\\| / std", "values per channel"),
        Table("float32: layout", "activation"),
    )
    broken = 0
    for i in range(count):
        d = draw(o.seed, i, dtypes, counts)
        case, e = made(d, o.seed, o.device)
        found = promise.shares(
            run(ours, case, e), run(native, case, e), promise.measure(case, e), e
        )
        tables[0].add((d.dtype, f"{d.magnitude:g}", f"{d.counts[0]} to {d.counts[1]}"), found)
        if d.dtype == "float32":
            tables[1].add((d.layout, d.act), found)
        for name, share in found.items():
            if share.beside > 1 or share.alone > 1:
                broken += 1
                print(f"BROKEN: {d}: {name} {share.ours:.3g} u, native's {share.native:.3g} u; "
                      f"{share.beside:.3g} of bound 1, {share.alone:.3g} of bound 2")  # fmt: skip
    print(f"bnorm_ext {bnorm_ext.__version__}, torch {torch.__version__}, {o.device}, "
          f"{bnorm_ext.build_info()['cpu_capability']}: {count} cases, seed {o.seed}, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    for table in tables:
        print()
        for line in table.lines():
            print(line)
    print()
    print(f"{broken} results break the promise" if broken else "the promise holds in every case")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
