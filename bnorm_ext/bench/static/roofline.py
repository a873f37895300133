"""How long a kernel takes at least: bytes, instructions, FP64, latency, barriers, and what binds.

Model, for a kernel that handles E elements of x on a GPU:
  bytes       bytes moved / rate of a copy
  issue       instructions / what the schedulers start; likewise for each unit: fp64 ...
  latency     by Little's law: bytes moved / (bytes in flight / latency of memory)
A kernel of two passes loads, computes and stores all the time: its time is the largest of these.
A resident kernel first loads its tile, then computes, then stores. Blocks of one wave do so in
step, so that the times add up; where there are several waves, blocks of different waves overlap,
and only the first wave's share of the shorter time is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .gpus import Gpu
from .kernels import Counts, LoopCounts

# The same for all GPUs. The barriers are those of an H200 (bench/results/cuda-terms.json); latency
# and ramp are assumed.
LATENCY = 0.7e-6  # s, of a load from memory under load
RAMP = 2.0e-6  # s, from the start of a kernel to its first load, and from its last store to its end
CLUSTER_BARRIER = 0.19e-6  # s
GRID_BARRIER = 1.7e-6  # s, of a team's blocks through global memory
THREADS = 256  # of a block
_SHARED = ("LDS", "STS", "LDGSTS")
# Vectors of all tensors that a thread has asked for at once, in two passes: the next batch is asked
# for before the last one has arrived.
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
    gpu: Gpu, counts: Counts, elements: int, tensors_moved: int, item: int, plan: dict[str, Any]
) -> Prediction:
    """One of the kernels of the two-pass path, whose tensors are read from memory."""
    blocks = plan["tiles"] * plan["team"]
    busy = units(gpu, counts.loops, elements)
    busy["issue"] += _rest(gpu, counts, blocks)
    moved = tensors_moved * elements * item
    resident = min(gpu.rates.threads, _by_registers(gpu, counts))
    in_flight = gpu.multiprocessors * resident * IN_FLIGHT * plan["access_bytes"]
    terms = {"bytes": moved / gpu.copy, **busy, "latency": moved / (in_flight / LATENCY)}
    return Prediction(terms, max(terms.values()) + RAMP)


def resident(
    gpu: Gpu, counts: Counts, elements: int, tensors_moved: int, item: int, plan: dict[str, Any]
) -> Prediction:
    """A kernel that keeps its tile in shared memory."""
    fit = gpu.shared_per_multiprocessor // (plan["shared_bytes"] + 1024)
    fit = max(1, min(fit, _by_registers(gpu, counts) // THREADS))
    blocks = plan["tiles"] * plan["team"]
    waves = math.ceil(blocks / (fit * gpu.multiprocessors))
    if plan["path"] == "grid":
        waves = math.ceil(plan["tiles"] / plan["teams"])
        overlapping = min(waves, plan["teams"])
    else:
        overlapping = waves
    fetch = tuple(loop for loop in counts.loops if loop.role == "fetch")
    sums = tuple(loop for loop in counts.loops if loop.role == "sums")
    write = tuple(loop for loop in counts.loops if loop.role == "write")
    moved = tensors_moved * elements * item
    bytes_time = moved / gpu.copy
    # A wave's blocks load together: the loads of all of a block's tile are in flight at once.
    full = units(gpu, counts.loops, elements)
    full["issue"] += _rest(gpu, counts, blocks)
    computing = max(units(gpu, sums, elements).values()) + _rest(gpu, counts, blocks)
    storing = max(units(gpu, write, elements).values())
    loading = max(units(gpu, fetch, elements).values(), default=0.0)
    written = 1 / tensors_moved
    memory = max(bytes_time * (1 - written), loading) + max(bytes_time * written, storing)
    barriers = {"cluster": 2 * CLUSTER_BARRIER, "grid": GRID_BARRIER}.get(plan["path"], 0.0) * waves
    # Uneven last wave.
    filled = blocks / (fit * gpu.multiprocessors)
    uneven = waves / filled if plan["path"] != "grid" and waves > 1 else 1.0
    longer, shorter = max(memory, computing), min(memory, computing)
    time = longer * max(1.0, min(uneven, 2.0)) + shorter / overlapping + barriers + RAMP
    time = max(time, max(full.values()) + RAMP)
    return Prediction({"bytes": bytes_time, **full, "barriers": barriers}, time)


def _by_registers(gpu: Gpu, counts: Counts) -> int:
    """Threads that a multiprocessor holds by registers; whole blocks."""
    blocks = gpu.rates.registers // (THREADS * max(counts.registers, 1))
    return max(1, blocks) * THREADS
