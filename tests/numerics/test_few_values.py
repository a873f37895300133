"""Small batches, where roundings do not average out: the mean's in a channel of two to four values,
and those of sums that cancel."""

from __future__ import annotations

import pytest
import torch

from bnorm_ext.bench import numerics, promise
from tests.common.cases import assert_kept, case, normal, threads

U = 2.0**-24


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threads(1):
        yield


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_two_to_four_values(dtype: str) -> None:
    """Random cases with every activation, most of them with a mean far from 0."""
    broken = []
    for i in range(600):
        d = numerics.draw(7, i, [dtype], numerics.COUNTS[:1])
        c, e = numerics.made(d, 7)
        both = numerics.run(numerics.ours, c, e), numerics.run(numerics.native, c, e)
        found = promise.shares(*both, promise.measure(c, e), e)
        broken += [f"{d}: {n} {s}" for n, s in found.items() if s.beside > 1 or s.alone > 1]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [1.0, 1e2, 1e4])
def test_no_result_sees_the_rounding_of_the_mean(mean: float, layout: str, act: str) -> None:
    """Bound (2) as if the mean was 0, in training, however many values there are."""
    for shape in ((2, 5, 1, 1), (1, 3, 1, 4), (4, 8, 5, 7)):
        c = case(normal(shape, 3, mean), torch.float32, layout=layout)
        e = promise.Epilogue(None, act)
        c = promise.away_from_kinks(c, e)
        m = promise.measure(c, e)
        m = m._replace(ratio=torch.zeros_like(m.ratio))
        both = numerics.run(numerics.ours, c, e), numerics.run(numerics.native, c, e)
        assert_kept(promise.shares(*both, m, e), beside_native=False)


def test_hardswish_between_its_kinks() -> None:
    """Its slope of up to 1.5 amplifies the error of z, which y is measured against."""
    worst = 0.0
    for seed in range(120):
        c = case(normal((4, 8, 6, 7), seed, 0.5, 2), torch.float32, seed=seed)
        e = promise.Epilogue(None, "hardswish")
        c = promise.away_from_kinks(c, e)
        both = numerics.run(numerics.ours, c, e), numerics.run(numerics.native, c, e)
        found = promise.shares(*both, promise.measure(c, e), e)
        assert_kept(found)
        worst = max(worst, found["y"].ours)
    assert worst < 3.5
