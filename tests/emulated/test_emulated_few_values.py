"""Two to four values per channel, where the rounding of the mean does not average out: the kernels
account for what it leaves out, in both directions."""

from __future__ import annotations

import pytest
import torch

from bnorm_ext.bench import numerics, promise
from bnorm_ext.bench.cases import DTYPES
from tests.common import emulated
from tests.common.cases import assert_kept, case, normal
from tests.common.emulated import Epilogue
from tests.common.emulated_cases import known, native

PATHS = [
    pytest.param(dtype, path, id=f"{str(dtype).removeprefix('torch.')}-{path}")
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for path in (("two_pass",) if dtype == torch.float64 else ("two_pass", "block"))
]
SHAPES = [
    pytest.param((2, 40), "contiguous", id="rows"),
    pytest.param((3, 7), "contiguous", id="odd rows"),
    pytest.param((1, 6, 1, 4), "contiguous", id="positions"),
    pytest.param((1, 8, 3, 1), "contiguous", id="groups of channels"),
    pytest.param((2, 16, 1, 2), "channels_last", id="channels last"),
]
ACTS = ["identity", "relu", "silu", "hardswish"]


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize(("dtype", "path"), PATHS)
def test_bounds(dtype: torch.dtype, path: str, shape: tuple[int, ...], layout: str) -> None:
    """Both bounds. The second does not depend on the mean: its rounding reaches no result."""
    for i, act in enumerate(ACTS):
        for mean in (3.0, 1e3 if dtype == torch.bfloat16 else 1e4):
            c = case(normal(shape, 50 + i, mean), dtype, layout=layout, seed=i)
            residual = torch.empty_like(c.x).copy_(normal(shape, i)) if i % 2 else None
            e = Epilogue(act, 0.1, residual)
            c = promise.away_from_kinks(c, known(e))
            m = promise.measure(c, known(e))
            ours = emulated.run(c, e, path=path)
            ours = {name: t for name, t in ours.items() if name in m.reference}
            assert_kept(promise.shares(ours, native(c, e), m, known(e)))


@pytest.mark.parametrize("path", ["two_pass", None])
def test_random_small_cases(path: str | None) -> None:
    """Those of `bench.numerics` with up to 64 values per channel, in every dtype and layout."""
    broken = []
    for i in range(200):
        d = numerics.draw(11, i, list(DTYPES), numerics.COUNTS[:2])
        c, given = numerics.made(d, 11)
        e = Epilogue(given.act, given.slope, given.residual)
        m = promise.measure(c, given)
        ours = emulated.run(c, e, path=path)
        ours = {name: t for name, t in ours.items() if name in m.reference}
        found = promise.shares(ours, native(c, e), m, given)
        broken += [f"{d}: {n} {s}" for n, s in found.items() if s.beside > 1 or s.alone > 1]
    assert not broken, "\n" + "\n".join(broken)
