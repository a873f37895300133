"""Predicted times: which terms count for which kernel, and how a sweep uses the L2."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from bnorm_ext.bench.static import compile as compiling
from bnorm_ext.bench.static import gpus, kernels, predict, roofline, sass
from bnorm_ext.bench.static.counts import Pass, loop_pass
from bnorm_ext.bench.static.flow import Flow

# Its loop adds one double for eight elements, which it loads and stores.
LOOP = """
	code for sm_90
		Function : example
        /*0000*/                   LDG.E.128 R4, [R10.64] ;
        /*0010*/                   F2F.F64.F32 R16, R4 ;
        /*0020*/                   DADD R18, R18, R16 ;
        /*0030*/                   STG.E.128 [R20.64], R4 ;
        /*0040*/               @P1 BRA 0x00 ;
        /*0050*/                   EXIT ;
"""
H200 = gpus.gpu("H200")
COPY = gpus.COPY * 4.8e12
PLAN = {"path": "grid", "on_chip": False, "tiles": 2, "team": 72, "teams": 2, "access_bytes": 16}


@pytest.fixture
def once() -> Pass:
    (function,) = sass.parse(LOOP)
    flow = Flow(function, {})
    return loop_pass(flow, flow.loops[0], ("LDG", "STG"), 128)


def counts(once: Pass, *roles: str) -> kernels.Counts:
    kernel = kernels.Kernel("k", "k.cu", "P", 1, roles.count("sums"), roles.count("write"))
    loops = tuple(kernels.LoopCounts(role, 8, once) for role in roles)
    return kernels.Counts(kernel, "float32", 4, "channels_first", 90, 32, loops, once)


def test_more_work_takes_no_less_time(once: Pass) -> None:
    given, plan = counts(once, "write"), {"tiles": 64, "team": 8, "access_bytes": 16}
    times = [
        roofline.two_pass(H200, given, elements, 2, 4, plan).time for elements in (1 << 20, 1 << 24)
    ]
    assert times[0] < times[1]
    terms = roofline.two_pass(H200, given, 1 << 24, 2, 4, plan).terms
    assert terms["bytes"] == pytest.approx(2 * 4 * (1 << 24) / COPY)
    assert terms["fp64"] == pytest.approx((1 << 24) / 8 / 64 / 132 / 1.98e9)


@pytest.mark.parametrize("elements", [1 << 20, 1 << 24])
@pytest.mark.parametrize("read", [1, 2])
def test_a_second_pass_finds_a_share_in_the_l2(once: Pass, elements: int, read: int) -> None:
    plan = {"tiles": 64, "team": 8, "access_bytes": 16}
    cold, warm = (
        roofline.two_pass(H200, counts(once, "write"), elements, read + 1, 4, plan, again)
        for again in (0, read)
    )
    found = min(read * 4 * elements, roofline.L2_SHARE * 62914560)
    assert cold.terms["bytes"] - warm.terms["bytes"] == pytest.approx(found / COPY)
    assert warm.time < cold.time


@pytest.mark.parametrize("elements", [1 << 20, 1 << 24])
@pytest.mark.parametrize("read", [1, 2])
def test_a_sweep_reads_from_memory_what_the_l2_does_not_have(
    once: Pass, elements: int, read: int
) -> None:
    found = roofline.sweeps(H200, counts(once, "sums", "write"), elements, read, 4, PLAN)
    tensor = 4 * elements
    again = max(0, read * tensor - roofline.L2_SHARE * 62914560)
    moved = read * tensor + again + tensor
    assert found.terms["bytes"] == pytest.approx(moved / COPY)
    assert found.terms["fp64"] == pytest.approx(2 * elements / 8 / 64 / 132 / 1.98e9)
    # The sweeps follow one another: each takes its longest term.
    assert found.time > found.terms["bytes"] + found.terms["barriers"] + roofline.RAMP


def test_each_sweep_takes_its_own_longest_term(once: Pass) -> None:
    slow = dataclasses.replace(once, code=once.code * 1000)
    both = counts(once, "sums", "write")
    elements = 1 << 22
    usual = roofline.sweeps(H200, both, elements, 1, 4, PLAN)
    for n in (0, 1):
        loops = list(both.loops)
        loops[n] = dataclasses.replace(loops[n], once=slow)
        slower = dataclasses.replace(both, loops=tuple(loops))
        found = roofline.sweeps(H200, slower, elements, 1, 4, PLAN)
        computing = max(roofline.units(H200, (loops[n],), elements).values())
        assert computing < found.time < computing + usual.time


def test_few_blocks_have_few_bytes_in_flight(once: Pass) -> None:
    both = counts(once, "sums", "write")
    one, two = (
        roofline.sweeps(H200, both, 1 << 24, 1, 4, {**PLAN, "team": team}).terms["latency"]
        for team in (66, 132)
    )
    assert one == pytest.approx(2 * two)


@pytest.mark.parametrize(
    ("path", "team", "seconds"),
    [
        ("block", 1, 0.0),
        ("cluster", 8, 2 * roofline.CLUSTER_BARRIER),
        ("grid", 1, 0.0),
        ("grid", 2, roofline.TEAM_SUM),
        ("grid", 72, roofline.TEAM_SUM),
        ("grid", 73, roofline.LARGE_TEAM_SUM),
    ],
)
def test_a_team_adds_up(once: Pass, path: str, team: int, seconds: float) -> None:
    """In a grid once or with a second barrier; in each round."""
    plan = {**PLAN, "path": path, "team": team, "tiles": 12, "teams": 4}
    on_chip = roofline.resident(H200, counts(once, "sums", "write"), 1 << 20, 2, 4, plan)
    assert on_chip.terms["barriers"] == pytest.approx(3 * seconds)
    if path != "cluster":
        swept = roofline.sweeps(H200, counts(once, "sums", "write"), 1 << 20, 1, 4, plan)
        assert swept.terms["barriers"] == seconds


def test_a_large_team_is_what_the_kernels_take_for_one() -> None:
    source = compiling.CSRC / "cuda" / "team.cuh"
    if not source.exists():
        pytest.skip("the kernels' sources are not here")
    (found,) = re.findall(r"kAddedByAll = (\d+);", source.read_text())
    assert int(found) == roofline.ADDED_BY_ALL


def test_teams_without_a_tile_in_the_last_round_wait(once: Pass) -> None:
    plan = {**PLAN, "path": "block", "team": 1}
    even, uneven = (
        roofline.resident(
            H200, counts(once, "sums", "write"), 1 << 24, 2, 4, {**plan, "tiles": 264, "teams": n}
        ).time
        for n in (132, 140)
    )
    assert even < uneven


@pytest.mark.parametrize(
    ("layout", "dtype", "kernels_of"),
    [
        ("channels_last", torch.float32, ("sweep_{}_kernel",)),
        ("contiguous", torch.float32, ("resident_{}_kernel",)),
        ("channels_last", torch.float64, None),
    ],
)
@pytest.mark.parametrize("tensors", [1, 2])
def test_each_path_is_predicted_by_its_kernels(
    monkeypatch: pytest.MonkeyPatch, once: Pass, layout: str, dtype: torch.dtype,
    kernels_of: tuple[str, ...] | None, tensors: int,
) -> None:  # fmt: skip
    asked: list[str] = []

    def instance(kernel: kernels.Kernel, *_: Any) -> kernels.Counts:
        asked.append(kernel.name)
        return counts(once, "sums", "write")

    monkeypatch.setattr(predict, "_instance", instance)
    layer = predict.predict((64, 256, 14, 14), dtype, layout, tensors, H200)
    direction = ("forward", "backward")[tensors - 1]
    two = (
        ["statistics_kernel", "normalise_kernel"]
        if tensors == 1
        else ["backward_reduce_kernel", "backward_apply_kernel"]
    )
    assert asked == ([k.format(direction) for k in kernels_of] if kernels_of else two)
    assert len(layer.launches) == len(asked)
    tensor = 64 * 256 * 14 * 14 * dtype.itemsize
    moved = sum(launch.terms["bytes"] for launch in layer.launches) * COPY
    # Read once, or twice of which the second time less than an L2 has.
    if layout == "contiguous":
        assert moved == pytest.approx((tensors + 1) * tensor)
    else:
        saved = min(tensors * tensor, roofline.L2_SHARE * 62914560)
        assert moved == pytest.approx((2 * tensors + 1) * tensor - saved)
