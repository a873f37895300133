"""What the profiler says of one training step: peak memory, and batch norm's share of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "measured step"
BATCH_NORM = ("batch_norm", "batchnorm")  # in the names of operators and autograd nodes


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Of tensors, in one step, over what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # what it leaves behind is known to the profiler when the next one frees it
        with record_function(_MEASURED):
            step()
    return peak_of(profiler.profiler.kineto_results.events())


def peak_of(events: Sequence[Any]) -> int:
    """The most bytes that tensors held at once while what is named _MEASURED ran, over what they
    held before, of a profiler's raw events."""
    start = next(e.start_ns() for e in events if e.name() == _MEASURED)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before = sum(change for when, change in changes if when < start)
    held = peak = before
    for when, change in changes:
        if when >= start:
            held += change
            peak = max(peak, held)
    return peak - before


def _is_batch_norm(name: str) -> bool:
    return any(part in name.lower() for part in BATCH_NORM)


def share(step: Callable[[], None], device: torch.device) -> float:
    """Of batch norm in a step, 0 to 1: outermost operators of that name over all outermost ones."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
    return share_of(profiler.events(), on_device=device.type == "cuda")


def share_of(events: Sequence[Any], *, on_device: bool) -> float:
    """Of profiler events. What lies within a batch norm counts as batch norm, once."""

    def own(event: Any) -> float:
        if on_device:
            return event.self_device_time_total
        return event.self_cpu_time_total

    mine = everything = 0.0
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            continue  # kernels are counted with the operators that launched them
        ancestor = event
        while ancestor is not None and not _is_batch_norm(ancestor.name):
            ancestor = ancestor.cpu_parent
        everything += own(event)
        mine += own(event) if ancestor is not None else 0
    return mine / everything if everything else 0.0
