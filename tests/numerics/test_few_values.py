"""Small batches, where roundings do not average out: the mean's in a channel of two to four values,
and those of sums that cancel."""

from __future__ import annotations

import pytest
import torch

from bnorm_ext.bench import numerics, promise
from tests.common.cases import BOTH, assert_kept, case, errors, measure, normal, run, threads

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
    """Bound (2), which does not depend on the mean."""
    for shape in ((2, 5, 1, 1), (1, 3, 1, 4), (4, 8, 5, 7)):
        c = case(normal(shape, 3, mean), torch.float32, layout=layout)
        e = promise.Epilogue(None, act)
        c = promise.away_from_kinks(c, e)
        m = promise.measure(c, e)
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


def test_bias_gradients_are_sums_as_good_as_their_terms() -> None:
    """A few thousand small cases: relative to the sum of magnitudes, dbias is within a unit and
    beside native. Relative to a sum that cancels neither would be within any number of units."""
    worst, of_result = 0.0, {"ours": 0.0, "native": 0.0}
    squares = {"ours": 0.0, "native": 0.0}
    sizes = [1, 2, 7, 16, 31, 64, 100, 257, 300]
    shapes = [(n, 3, h, w) for n in (1, 2, 5) for h in (1, 4) for w in sizes]
    for i in range(40 * len(shapes)):
        shape = shapes[i % len(shapes)]
        count = shape[0] * shape[2] * shape[3]
        if count == 1:
            continue
        layout = "channels_last" if i % 5 == 0 else "contiguous"
        c = case(normal(shape, i, 0.5), torch.float32, seed=i, layout=layout, weight=None)
        m = measure(c)
        results = {name: run(function, c) for name, function in BOTH.items()}
        found = {name: errors(r, m)["dbias"] / U for name, r in results.items()}
        ours, native = (t.max().item() for t in found.values())
        assert ours <= max(1.25 * native, 4), (shape, ours, native)
        worst = max(worst, ours)
        for name, t in found.items():
            squares[name] += t.square().sum().item()
            right = m.reference["dbias"]
            off = (results[name]["dbias"].double() - right).abs() / right.abs() / U
            of_result[name] = max(of_result[name], off.max().item())
    assert worst < 2
    assert squares["ours"] < squares["native"]
    assert min(of_result.values()) > 100
