"""Where semaphores live (csrc/cuda/semaphores.h): CUDA graphs, their pools, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.common import emulated
from tests.common.emulated_cases import made
from tests.common.emulated_host import (
    Operations,
    calls,
    capture,
    disjoint,
    library,
    on_stream,
    pool,
    words,
)

SHAPE = (24, 2, 32, 48)
# Every use of semaphores: to elect the last block, for the barriers of teams, to count tiles.
CASES: dict[str, dict[str, Any]] = {
    "two passes": {"path": "two_pass", "device": "sm_80", "multiprocessors": 3},
    "grid": {"path": "grid", "device": "sm_80", "multiprocessors": 3},
    "cumulative average": {"path": "block", "device": "sm_80", "multiprocessors": 3},
}


def trained(s: emulated.Session, name: str) -> list[Tensor]:
    """Forward and backward of one layer; all that they return."""
    c = made((8, 3, 8, 8) if name == "cumulative average" else SHAPE, torch.float32, "contiguous")
    x, dy = s.copy(c.x), s.copy(c.dy)
    running = [s.copy(torch.zeros(c.x.shape[1]), inout=True) for _ in range(2)]
    counter = s.copy(torch.tensor(3), inout=True)
    with pool() as graphs, Operations() as operations:
        y, mean, rstd, mask = s.call(
            *("batch_norm_training", x, None, None, None, *running, counter, None, c.eps),
            *("identity", 0.0, False),
        )
        *gradients, dweight, dbias = s.call(
            *("batch_norm_backward", dy, x, None, None, None, None, None, mean, rstd, True),
            *(c.eps, None, "identity", 0.0, [True, False, True, True]),
        )
        found = [y, mean, rstd, mask, gradients[0], dweight, dbias]
        graphs.check(found)
    assert "aten.empty.memory_format" in operations.names
    assert not any("zero" in name or "fill" in name for name in operations.names)
    return [t.clone() for t in found]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_nothing_stays_in_a_pool(name: str) -> None:
    """Torch's graph trees warm up in the graph's pool without capturing, and check then that only
    outputs live there. Nothing is filled either: a graph has the nodes of the kernels alone."""
    with emulated.session(**CASES[name]) as s:
        warm = trained(s, name)
        with capture():
            captured = trained(s, name)
        assert same(captured, warm)
        assert same(trained(s, name), warm)
    kinds = [line.split("::")[2].split("_kernel")[0] for line in s.launches]
    one_of_two = ["statistics", "normalise", "backward_reduce", "backward_apply"]
    resident = ["resident_forward", "resident_backward"]
    assert kinds == (one_of_two if name == "two passes" else resident) * 3


def test_statistics_alone_in_a_pool() -> None:
    c = made((8, 2, 32, 48), torch.float32, "contiguous")
    with emulated.session() as s:
        x = s.copy(c.x)
        with pool() as graphs, Operations() as operations:
            found = s.call("batch_norm_stats", x)
            graphs.check(found)
    assert not any("zero" in name for name in operations.names)


@pytest.mark.parametrize("phases", [False, True])
def test_launches_that_may_overlap_share_no_words(phases: bool) -> None:
    """Streams, graphs, and branches of a graph; what one stream orders shares."""
    with emulated.session():
        eager = words(100, phases=phases)
        assert words(100, phases=phases) == eager
        with on_stream(1):
            beside = words(100, phases=phases)
        with capture():
            first = words(100, phases=phases)
            assert words(50, phases=phases).start == first.start
        with capture(also=[2]):
            second = words(100, phases=phases)
            library().runner_stream(2)
            branch = words(100, phases=phases)
        assert words(100, phases=phases) == eager
        assert disjoint(eager, beside, first, second, branch)
        with on_stream(1):
            assert words(100, phases=phases) == beside


def test_semaphores_are_no_phases() -> None:
    with emulated.session():
        assert disjoint(words(100), words(100, phases=True))


def test_words_of_a_graph_live_as_long_as_it() -> None:
    with emulated.session():
        with capture() as graph:
            found = words(3000)
        with capture() as later:
            assert disjoint(found, words(3000))
        graph.destroy()
        with capture() as last:
            assert words(3000) == found
        later.destroy()
        last.destroy()


def test_a_range_grows_beside_the_one_in_use() -> None:
    with emulated.session():
        with capture() as graph:
            small = words(200)
            large = words(1000)
            assert words(200).start == large.start
        with on_stream(1):
            other = words(200)
        assert disjoint(small, large, other)
        graph.destroy()


def forward(s: emulated.Session, x: Tensor, eps: float) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = s.call(
        *("batch_norm_training", x, None, None, None, None, None, None, 0.1, eps),
        *("identity", 0.0, False),
    )
    return found


def test_where_all_words_are_in_use_a_call_has_its_own() -> None:
    """Right, and again nothing stays in the pool. What a grid needs are words for barriers."""
    c = made(SHAPE, torch.float32, "contiguous")
    with emulated.session(**CASES["grid"]) as s:
        x = s.copy(c.x)
        expected = forward(s, x, c.eps)[0].clone()
        branches = range(1, 60)
        with capture(also=branches) as graph:
            for bits in range(20, 7, -1):  # of what is free, the largest ranges first
                for branch in branches:
                    with on_stream(branch):
                        words(2**bits, phases=True)
            with pool() as graphs, Operations() as operations:
                found = forward(s, x, c.eps)
                graphs.check(found)
            assert "aten.zeros.default" in operations.names
            assert torch.equal(found[0], expected)
        graph.destroy()
        with capture() as graph, Operations() as operations:
            words(100, phases=True)
        assert operations.names == []
        graph.destroy()


def test_the_runtime_is_asked_once_for_each_device() -> None:
    """Limits, residency and attributes: the second call of a shape asks nothing."""
    c = made(SHAPE, torch.float32, "contiguous")
    for path in ("two_pass", "grid", None):
        with emulated.session(path=path, device="sm_80", multiprocessors=7) as s:
            x = s.copy(c.x)
            asked = []
            for _ in range(3):
                forward(s, x, c.eps)
                asked.append(len(calls()))
        assert asked[1:] == asked[:1] * 2


def test_attributes_are_the_most_and_set_once() -> None:
    """Whatever a launch needs: another thread's plan must not lower the limit under it."""
    most = {8: 232448, 14: 1}  # bytes of shared memory, wide clusters
    set_lines: list[str] = []
    for shape in ((4, 6, 4, 8), SHAPE, (24, 3, 48, 48)):
        c = made(shape, torch.bfloat16, "contiguous")
        with emulated.session(path=None, device="sm_90", multiprocessors=9) as s:
            x = s.copy(c.x)
            for _ in range(2):
                forward(s, x, c.eps)
            set_lines += [line for line in calls() if line.startswith("cudaFuncSetAttribute")]
    assert len(set_lines) == len(set(set_lines)) == 2
    for line in set_lines:
        attribute, value = map(int, line.split()[-2:])
        assert value == most[attribute]


def test_a_gpu_without_code_is_asked_once() -> None:
    """That it has none is an answer, not an error that the next caller sees."""
    with emulated.session(device="sm_70", multiprocessors=5):
        assert library().runner_has_code() == 0
        assert library().runner_has_code() == 0
        assert calls() == ["cudaFuncGetAttributes"]
    with emulated.session(device="sm_75", multiprocessors=5):
        assert library().runner_has_code() == 1
    c = made((4, 6, 4, 8), torch.float32, "contiguous")
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):  # noqa: SIM117
        with emulated.session(device="sm_70", path=None) as s:
            forward(s, s.copy(c.x), c.eps)


def test_no_cooperative_grid_beside_collectives() -> None:
    """Unless it is asked for."""
    c = made((40, 2, 32, 48), torch.float32, "contiguous")  # more than a block's shared memory
    where: dict[str, Any] = {"multiprocessors": 8, "device": "sm_80"}
    kinds = {}
    results = {}
    try:
        for beside in (False, True, False):
            library().runner_beside_collectives(beside)
            for path in (None, "grid"):
                lines: list[str] = []
                results[beside, path] = emulated.run(c, path=path, launches=lines.append, **where)
                kinds[beside, path] = ["resident" in line for line in lines]
    finally:
        library().runner_beside_collectives(False)
    assert kinds[False, None] == kinds[False, "grid"] == kinds[True, "grid"] == [True] * 2
    assert kinds[True, None] == [False] * 4
    expected = emulated.run(c, path="two_pass", **where)
    assert all(torch.equal(results[True, None][name], t) for name, t in expected.items())
