"""How long a kernel takes at least: bytes, instructions, FP64, latency, barriers, and what binds.

Model, for a kernel that handles E elements of x on a GPU:
  bytes       bytes moved / rate of a copy
  issue       instructions / what the schedulers start; likewise for each unit: fp64 ...
  latency     by Little's law: bytes moved / (bytes in flight / latency of memory)
A kernel of two passes loads, computes and stores all the time: its time is the largest of these.
A sweep is two such kernels in one launch, with a barrier between them. Of what a second pass or a
second sweep reads again, an effective share of the L2 does not come from memory.
A kernel on chip first loads its tile, then computes, then stores. The teams of one round do so in
step, so that the times add up; where a team takes several tiles, rounds overlap, and only the first
round's share of the shorter time is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .gpus import Gpu
from .kernels import Counts, LoopCounts

# The same for all GPUs. All but the latency are measured on an H200, the cluster's barrier by
# bench/terms.cu (bench/results/cuda-terms.json), the others by kernels of their own with a cold L2.
LATENCY = 0.7e-6  # s, of a load from memory under load; assumed
RAMP = 3.1e-6  # s, an empty launch between two events
CLUSTER_BARRIER = 0.19e-6  # s
# Seconds in which the blocks of a team of a grid add up what they have found: 13 to 33 blocks take
# 2.3 to 3.1 us; 131 blocks, which need a second barrier, 4.2 us.
TEAM_SUM, LARGE_TEAM_SUM = 2.7e-6, 4.2e-6
ADDED_BY_ALL = 72  # kAddedByAll in csrc/cuda/team.cuh
# What is read again in the reverse order comes from the L2 up to this share of it, at no cost. A
# copy of 26, 52 and 95 MB takes 4.8, 5.0 and 4.3 us less if the tensor has just been read: at the
# rate of a copy, 4.2 TB/s, these are 18 to 21 of the L2's 63 MB.
L2_SHARE = 0.31
THREADS = 256  # of a block
_SHARED = ("LDS", "STS", "LDGSTS")
# Vectors of all tensors that a thread has asked for at once, where nothing stays on chip: the next
# batch is asked for before the last one has arrived.
IN_FLIGHT = 8


@dataclass(frozen=True)
class Prediction:
    """Times in seconds."""

    terms: dict[str, float]  # each alone
    time: float  # of the launch

    @property
    def binds(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])


def units(gpu: Gpu, loops: tuple[LoopCounts, ...], elements: float) -> dict[str, float]:
    """Seconds for which each unit is busy, where ``elements`` of x are handled."""
    rates, per_second = gpu.rates, gpu.multiprocessors * gpu.memory.clock

    def total(unit: str | None) -> float:
        return elements * sum(loop.per_element(unit) for loop in loops)

    shared = sum(
        elements / loop.elements * sum(i.bits / 8 for i in loop.once.code if i.name in _SHARED)
        for loop in loops
    )  # fmt: skip
    return {
        "issue": total(None) / 32 / rates.issue / per_second,
        "fp64": total("fp64") / rates.fp64 / per_second,
        "conversions": total("conversions") / rates.conversions / per_second,
        "conversions64": total("conversions64") / rates.conversions64 / per_second,
        "conversions16": total("conversions16") / rates.conversions16 / per_second,
        "special": total("special") / rates.special / per_second,
        "shared": shared / rates.shared_bytes / per_second,
    }


def _rest(gpu: Gpu, counts: Counts, blocks: float) -> float:
    warps = blocks * THREADS / 32
    return (
        warps * counts.rest.instructions / gpu.rates.issue / gpu.multiprocessors / gpu.memory.clock
    )


def two_pass(
    gpu: Gpu,
    counts: Counts,
    elements: int,
    tensors_moved: int,
    item: int,
    plan: dict[str, Any],
    tensors_again: int = 0,
) -> Prediction:
    """One of the kernels of the two-pass path. tensors_again: of those moved, how many the launch
    before has just read."""
    blocks = plan["tiles"] * plan["team"]
    busy = units(gpu, counts.loops, elements)
    busy["issue"] += _rest(gpu, counts, blocks)
    tensor = elements * item
    moved = tensors_moved * tensor - _from_l2(gpu, tensors_again * tensor)
    resident = min(gpu.rates.threads, _by_registers(gpu, counts))
    rate = _in_flight(gpu, resident, plan["access_bytes"])
    terms = {"bytes": moved / gpu.copy, **busy, "latency": moved / rate}
    return Prediction(terms, max(terms.values()) + RAMP)


def sweeps(
    gpu: Gpu, counts: Counts, elements: int, tensors_read: int, item: int, plan: dict[str, Any]
) -> Prediction:
    """A kernel that reads its tensors once to add up, and once more to write one."""
    blocks = plan["tiles"] * plan["team"]
    of_multiprocessor = math.ceil(blocks / gpu.multiprocessors)
    resident = min(of_multiprocessor * THREADS, _by_registers(gpu, counts))
    rate = _in_flight(gpu, resident, plan["access_bytes"])
    tensor = elements * item
    read = tensors_read * tensor
    moved = {"sums": read, "write": read - _from_l2(gpu, read) + tensor}
    time = 0.0
    for role, these in moved.items():
        loops = tuple(loop for loop in counts.loops if loop.role == role)
        time += max(these / gpu.copy, these / rate, *units(gpu, loops, elements).values())
    full = units(gpu, counts.loops, elements)
    rest = _rest(gpu, counts, blocks)
    full["issue"] += rest
    barriers = _team_sum(plan)
    total = sum(moved.values())
    alone = {"latency": total / rate, "barriers": barriers}
    terms = {"bytes": total / gpu.copy, **full, **alone}
    return Prediction(terms, time + rest + barriers + RAMP)


def resident(
    gpu: Gpu, counts: Counts, elements: int, tensors_moved: int, item: int, plan: dict[str, Any]
) -> Prediction:
    """A kernel that keeps its tile in shared memory."""
    blocks = plan["tiles"] * plan["team"]  # each as often as it has a tile
    rounds = math.ceil(plan["tiles"] / plan["teams"])
    overlapping = min(rounds, plan["teams"]) if plan["path"] == "grid" else rounds
    fetch = tuple(loop for loop in counts.loops if loop.role == "fetch")
    sums = tuple(loop for loop in counts.loops if loop.role == "sums")
    write = tuple(loop for loop in counts.loops if loop.role == "write")
    moved = tensors_moved * elements * item
    bytes_time = moved / gpu.copy
    # The blocks of a round load together: the loads of all of a block's tile are in flight at once.
    full = units(gpu, counts.loops, elements)
    full["issue"] += _rest(gpu, counts, blocks)
    computing = max(units(gpu, sums, elements).values()) + _rest(gpu, counts, blocks)
    storing = max(units(gpu, write, elements).values())
    loading = max(units(gpu, fetch, elements).values(), default=0.0)
    written = 1 / tensors_moved
    memory = max(bytes_time * (1 - written), loading) + max(bytes_time * written, storing)
    barriers = _team_sum(plan) * rounds
    uneven = rounds * plan["teams"] / plan["tiles"]  # in the last round some teams have no tile
    longer, shorter = max(memory, computing), min(memory, computing)
    time = longer * uneven + shorter / overlapping + barriers + RAMP
    time = max(time, max(full.values()) + RAMP)
    return Prediction({"bytes": bytes_time, **full, "barriers": barriers}, time)


def _team_sum(plan: dict[str, Any]) -> float:
    """Seconds in which the blocks of a team add up what they have found for a tile."""
    if plan["path"] == "cluster":
        return 2 * CLUSTER_BARRIER
    if plan["path"] != "grid" or plan["team"] == 1:
        return 0.0
    return TEAM_SUM if plan["team"] <= ADDED_BY_ALL else LARGE_TEAM_SUM


def _from_l2(gpu: Gpu, again: float) -> float:
    """How many of the bytes that are read again do not come from memory."""
    return min(again, L2_SHARE * gpu.l2_bytes)


def _in_flight(gpu: Gpu, threads: int, access_bytes: int) -> float:
    """Bytes a second, by Little's law, with so many threads of a multiprocessor."""
    return gpu.multiprocessors * threads * IN_FLIGHT * access_bytes / LATENCY


def _by_registers(gpu: Gpu, counts: Counts) -> int:
    """Threads that a multiprocessor holds by registers; whole blocks."""
    blocks = gpu.rates.registers // (THREADS * max(counts.registers, 1))
    return max(1, blocks) * THREADS
