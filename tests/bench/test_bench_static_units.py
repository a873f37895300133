"""How busy units are beside memory, and the budget of the kernels' loops."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bnorm_ext.bench.static import kernels, sass, units
from bnorm_ext.bench.static.counts import Pass, loop_pass
from bnorm_ext.bench.static.flow import Flow

CI = Path(__file__).resolve().parents[2] / ".ci"

# Its loop adds one double for eight elements, which it loads and stores: five instructions.
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


@pytest.fixture
def once() -> Pass:
    (function,) = sass.parse(LOOP)
    flow = Flow(function, {})
    return loop_pass(flow, flow.loops[0], ("LDG", "STG"), 128)


def counts(once: Pass, *roles: str, dtype: str = "float32", arch: int = 90) -> kernels.Counts:
    kernel = kernels.Kernel("k", "k.cu", "P", 1, roles.count("sums"), roles.count("write"))
    loops = tuple(kernels.LoopCounts(role, 8, once) for role in roles)
    return kernels.Counts(kernel, dtype, 8, "channels_first", arch, 32, loops, once)


@pytest.mark.parametrize(
    ("roles", "tensors"),
    [(("sums",), 1), (("write",), 2), (("sums", "write"), 3), (("fetch", "sums", "write"), 2)],
)
def test_units_as_counted_by_hand(once: Pass, roles: tuple[str, ...], tensors: int) -> None:
    """A kernel that fetches its tile computes the rest from shared memory."""
    device, rates = units.rates_of("H200")
    found = units.busy(counts(once, *roles), device, rates)
    # 4.2 TB/s over 132 multiprocessors at 1.98 GHz.
    clocks = tensors * 4 / (0.875 * 4.8e12 / 132 / 1.98e9)
    passes = len(roles) / 8  # of the loop, for each element
    assert found["issue"] == pytest.approx(5 * passes / 32 / 4 / clocks)
    assert found["fp64"] == pytest.approx(passes / 64 / clocks)
    assert found["conversions64"] == pytest.approx(passes / 16 / clocks)
    assert found["conversions16"] == found["special"] == found["shared"] == 0


def test_blocks_and_bytes_in_flight(once: Pass) -> None:
    """32 registers: eight blocks; each thread loads 16 bytes in a pass."""
    found = counts(once, "sums")
    assert (found.blocks, found.in_flight) == (8, 8 * 256 * 16)
    for registers, blocks in ((33, 6), (96, 2), (128, 2), (80, 3)):
        assert dataclasses.replace(found, registers=registers).blocks == blocks


def test_few_fp64_units_bind(once: Pass) -> None:
    busy = {
        name: units.busy(counts(once, "sums"), *units.rates_of(name)) for name in ("T4", "B300")
    }
    assert all(found["fp64"] > found["issue"] for found in busy.values())


def test_rates_and_code_of_gpus() -> None:
    for name, code in (("T4", 75), ("A10", 86), ("H200", 90), ("B300", 100), ("RTX 5090", 120)):
        assert units.compiled_for(units.rates_of(name)[0]) == code


# --- the budget -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    if not CI.is_dir():
        pytest.skip("the checks of CI are not here")
    spec = importlib.util.spec_from_file_location("kernel_budget", CI / "kernel_budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def single(once: Pass) -> Pass:
    """The loop without FP64."""
    return dataclasses.replace(
        once, code=tuple(i for i in once.code if i.name not in ("DADD", "F2F"))
    )


def test_within_the_budget(budget: ModuleType, single: Pass) -> None:
    found = [counts(single, "sums")]
    taken = budget.budget_of(found)
    assert taken == {"sm_90": {"k float32 8 channels_first": 0.38}}
    assert budget.beyond(found, taken) == []
    assert budget.beyond(found, {}) == []  # no budget for this architecture


def test_a_lower_budget_is_exceeded(budget: ModuleType, single: Pass) -> None:
    may = {"sm_90": {"k float32 8 channels_first": 0.36}}
    (line,) = budget.beyond([counts(single, "sums")], may)
    assert line == "sm_90 k float32 8 channels_first: 0.38 instructions an element, at most 0.36"


def test_fp64_in_a_loop_is_beyond_any_budget(budget: ModuleType, once: Pass) -> None:
    found = [counts(once, "sums")]
    (line,) = budget.beyond(found, budget.budget_of(found))
    assert line == "sm_90 k float32 8 channels_first: 0.25 FP64 operations an element"
    found = [counts(once, "sums", dtype="float64")]
    assert budget.beyond(found, budget.budget_of(found)) == []


def test_an_instance_that_is_not_there_is_noticed(budget: ModuleType, single: Pass) -> None:
    lines = budget.beyond([counts(single, "sums")], {"sm_90": {"l float32 8 channels_last": 1.0}})
    assert lines == [
        "sm_90 k float32 8 channels_first: not in the budget",
        "sm_90 l float32 8 channels_last: in the budget, but not compiled",
    ]


def test_writing_keeps_other_architectures(
    budget: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    budget.write({"sm_80": {"k": 1.0}})
    budget.write({"sm_90": {"k": 2.0}})
    assert budget.read() == {"sm_80": {"k": 1.0}, "sm_90": {"k": 2.0}}


def _committed() -> dict[str, dict[str, float]]:
    if not CI.is_dir():
        pytest.skip("the checks of CI are not here")
    found: dict[str, dict[str, float]] = json.loads((CI / "kernel_budget.json").read_text())
    return found


def test_the_committed_budget_has_every_kernel() -> None:
    committed = _committed()
    assert sorted(committed) == ["sm_80", "sm_90"]
    for entries in committed.values():
        assert {name.split()[0] for name in entries} == {k.name for k in kernels.KERNELS}
        assert len(entries) == 106


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_planner_knows_what_loops_take(tensors: int, dtype: str, layout: str) -> None:
    """The instructions in csrc/cuda/cost.h are those of sm_90, to a fifth."""
    import torch

    from bnorm_ext._gpus import resolve_device
    from bnorm_ext.bench.cost_model import FORMATS
    from bnorm_ext.explain import launch_plan

    direction = ("forward", "backward")[tensors - 1]
    two = ("statistics_kernel", "normalise_kernel") if tensors == 1 else (
        "backward_reduce_kernel", "backward_apply_kernel")  # fmt: skip
    for channels in (256, 255):
        x: Any = torch.empty(64, channels, 14, 14 + channels % 2, dtype=getattr(torch, dtype),
                             device="meta")  # fmt: skip
        plan = launch_plan(x.contiguous(memory_format=FORMATS[layout]), tensors,
                           resolve_device("H200"))  # fmt: skip
        width = plan["access_bytes"] // x.element_size()
        case = f"{dtype} {width} {plan['mapping']}"
        if plan["on_chip"]:
            names: tuple[str, ...] = (f"resident_{direction}_kernel",)
        elif plan["path"] != "two_pass":
            names = (f"sweep_{direction}_kernel",)
        else:
            names = two
        taken = sum(_committed()["sm_90"][f"{name} {case}"] for name in names)
        # A tile on chip is fetched once more, in a loop of its own, when a team begins.
        fetched = 1.6 * tensors * (4 if dtype == "float32" else 2) / 2 if width > 1 else 0
        believed = sum(plan["instructions"]) + (fetched if plan["on_chip"] else 0)
        assert believed == pytest.approx(taken, rel=0.2), (case, names)
