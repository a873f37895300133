"""Peak memory of a training step, and batch norm's own time in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from .measure import page_faults

_MEASURED = "measured step"
_STEPS = 5  # that are profiled, because one alone may be a slow one
BATCH_NORM = ("batch_norm", "batchnorm")  # in the names of operators and autograd nodes


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The peak of the memory of tensors in one step, minus what was allocated before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # so that the profiler knows the allocations that the measured step frees
        with record_function(_MEASURED):
            step()
    return peak_of(profiler.profiler.kineto_results.events())


def peak_of(events: Sequence[Any]) -> int:
    """The peak of the bytes of tensors during the event _MEASURED, minus what was allocated before,
    from the raw events of a profiler."""
    start = next(e.start_ns() for e in events if e.name() == _MEASURED)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before = sum(change for when, change in changes if when < start)
    held = peak = before
    for when, change in changes:
        if when >= start:
            held += change
            peak = max(peak, held)
    return int(peak - before)


def _is_batch_norm(name: str) -> bool:
    return any(part in name.lower() for part in BATCH_NORM)


class Own(NamedTuple):
    """Of a step: the time of batch norm, that of all operators (on CUDA, of kernels), in
    microseconds, and the page faults."""

    batch_norm_us: float
    all_us: float
    faults: float

    @property
    def share(self) -> float:
        """Batch norm's part of the time."""
        return self.batch_norm_us / self.all_us if self.all_us else 0.0


class _Timer(TorchDispatchMode):
    """Times each operator on the CPU. The profiler does so too, but keeps its events in the memory
    that tensors come from: the largest ones then need fresh memory, and their page faults count as
    the time of the operator that makes them, which is often batch norm."""

    batch_norm_us = 0.0
    all_us = 0.0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        start = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        took = 1e6 * (time.perf_counter() - start)
        self.all_us += took
        self.batch_norm_us += took if _is_batch_norm(str(operator)) else 0
        return result


def times(step: Callable[[], None], device: torch.device) -> Own:
    """Medians of _STEPS steps."""
    found = []
    for _ in range(_STEPS):
        faults = page_faults()
        if device.type == "cuda":
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step()
            mine, everything = times_of(profiler.events())
        else:
            # The constructor is torch's, which has no annotations.
            with _Timer() as timer:  # type: ignore[no-untyped-call]
                step()
            mine, everything = timer.batch_norm_us, timer.all_us
        found.append((mine, everything, page_faults() - faults))
    return Own(*(statistics.median(values) for values in zip(*found, strict=True)))


def times_of(events: Sequence[Any]) -> tuple[float, float]:
    """The time on the device of batch norm, and of everything, in profiler events. All that a batch
    norm calls counts as batch norm."""
    mine = everything = 0.0
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            continue  # kernels are counted with the operators that launched them
        ancestor = event
        while ancestor is not None and not _is_batch_norm(ancestor.name):
            ancestor = ancestor.cpu_parent
        own = float(event.self_device_time_total)
        everything += own
        mine += own if ancestor is not None else 0
    return mine, everything
