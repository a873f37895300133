"""Timing: rounds in which each provider is called once, and statistics of the samples.

METHOD describes it; the help and every JSON file contain this text.
"""

from __future__ import annotations

import contextlib
import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from . import machine
from .clocks import clocks_of

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 10, 101
HURRIED_ROUNDS = 5  # if the time budget is used up
CACHES = ("cold", "warm")

METHOD = f"""\
Rounds. All providers and the copy are measured interleaved, on the same tensors, in one process:
each round calls each of them once, in an order drawn anew. {WARM_UP} rounds are not counted, then
{MIN_ROUNDS} to {MAX_ROUNDS}, as the time budget has room for ({HURRIED_ROUNDS} once it is spent).
A time is the median of the rounds, the spread p10 to p90. Before that every result is compared with
the float64 reference; a wrong one is marked and not ranked.
Passes. fwd: training forward, recorded for backward. eval: inference without gradients. bwd: the
gradients of x, weight, bias (and residual) of one recorded forward. Each call allocates its outputs
as a caller would have it; they are freed after the clock has stopped.
CPU. The clock is time.perf_counter around one call. cold: before each call all threads walk through
a buffer larger than the last-level cache, and outputs of 4 MB and more lie in fresh memory, so that
the call pays the page faults: a training step whose activations stay alive. warm: an untimed call
of the same kind comes right before, and freed memory is used again.
CUDA. Events around one call, on the stream, queued behind a sleeping kernel that ends only after
the whole batch is queued, so that gaps between launches are not timed; where that failed, the row
says so. cold: before each call a buffer of twice the L2 is written, then another one read, so that
the L2 holds no lines that the call would have to write back. warm: an untimed call comes right
before. SM and memory clocks are sampled while the device works, with the reasons that lowered them.
Copy. The ceiling is x.clone() for one tensor read and one written, x + dy for two and one, two
clones for two and two, in the same rounds with the same allocation: on the CPU, huge pages are
asked for, as bnorm_ext does for large outputs. bytes_floor: what must be read or written once,
tensors and masks of one bit per element; GB/s: bytes_floor over the median. % of copy: GB/s over
that of the copy.
Noise. A row is marked ~ where the medians of the first and the second half of the samples, its own
or the baseline's, differ by more than it differs from the baseline."""


@dataclass
class Work:
    """A call that is timed in each round. Its result stays alive until the clock has stopped."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    repeats: bool = True  #: whether a call may follow another one without `prepare`


@dataclass(frozen=True)
class Stats:
    """Statistics of samples, in microseconds."""

    median: float
    p10: float
    p90: float
    first_half: float  #: median of the first half of the samples
    second_half: float  #: median of the second half
    rounds: int

    @property
    def drift(self) -> float:
        return abs(self.first_half - self.second_half)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The percentile by linear interpolation between two samples."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def describe(samples: Sequence[float]) -> Stats:
    """The statistics of samples, given in the order in which they were taken."""
    middle = len(samples) // 2
    return Stats(
        statistics.median(samples),
        percentile(samples, 0.1),
        percentile(samples, 0.9),
        statistics.median(samples[:middle] or samples),
        statistics.median(samples[middle:]),
        len(samples),
    )


def within_noise(mine: Stats, base: Stats) -> bool:
    """Whether the two halves of the samples differ by more than the medians of the two."""
    return max(mine.drift, base.drift) > abs(mine.median - base.median)


class Timer(Protocol):
    """A clock for rounds of calls."""

    gaps: bool  #: whether the last rounds may include time in which the device was idle
    step: int  #: number of rounds to run at once
    faults: dict[str, list[int]]  #: page faults of each timed call by name of work, if counted

    def ready(self) -> AbstractContextManager[None]:
        """A context for the rounds of one case."""
        ...

    def rounds(self, works: Sequence[Work], count: int) -> list[list[float]]:
        """Runs `count` rounds; returns for each the microseconds of each work, in the order of
        `works`."""
        ...


def _order(count: int, round_: int) -> list[int]:
    """A random order of calls, different in each round and the same in every run."""
    order = list(range(count))
    random.Random(round_).shuffle(order)
    return order


def page_faults() -> int:
    """The page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class CpuTimer:
    def __init__(self, cache: str) -> None:
        self.cold = cache == "cold"
        self.gaps, self.step = False, 1
        self.faults: dict[str, list[int]] = {}
        self._round = 0
        self._buffer = torch.zeros(machine.cpu_flush_bytes() // 4) if self.cold else None

    def ready(self) -> AbstractContextManager[None]:
        machine.fresh_outputs(self.cold)
        return machine.no_large_holes() if self.cold else contextlib.nullcontext()

    def rounds(self, works: Sequence[Work], count: int) -> list[list[float]]:
        found = []
        for _ in range(count):
            times = [0.0] * len(works)
            for index in _order(len(works), self._round):
                work = works[index]
                work.prepare()
                if self._buffer is not None:
                    self._buffer.add_(1)
                else:
                    work.call()
                    work.prepare()
                before = page_faults()
                start = time.perf_counter()
                kept = work.call()
                times[index] = (time.perf_counter() - start) * 1e6
                self.faults.setdefault(work.name, []).append(page_faults() - before)
                del kept
            found.append(times)
            self._round += 1
        return found


class L2Flush:
    """Replaces what the L2 holds by lines that are clean.

    Written lines alone would be dirty: their write-back, up to the size of the L2, would fall into
    the call that follows.
    """

    def __init__(self, device: torch.device) -> None:
        floats = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 4
        self._written, self._read = (torch.zeros(floats, device=device) for _ in range(2))
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)


class CudaTimer:
    """Times by CUDA events, which are read at the end of a batch of rounds: no synchronisation is
    needed inside."""

    ATTEMPTS = 3
    LONGEST = 0.5  # seconds that the device may sleep

    def __init__(self, cache: str, device: torch.device) -> None:
        self.device, self.cold = device, cache == "cold"
        self.gaps, self.step = False, 5
        self.faults: dict[str, list[int]] = {}
        self._round = 0
        self._flush = L2Flush(device) if self.cold else None
        self._rate = self._cycles_per_second()
        self._sleep = 0.005  # seconds; grows until it is longer than queueing takes
        self._clocks = clocks_of(device)

    def ready(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def _cycles_per_second() -> float:
        cycles, (start, end) = 10_000_000, (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first launch loads the kernel
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
        torch.cuda.synchronize()
        return float(cycles / (start.elapsed_time(end) / 1e3))

    def rounds(self, works: Sequence[Work], count: int) -> list[list[float]]:
        for _ in range(self.ATTEMPTS):
            events, late, host = self._queue(works, count)
            if self._clocks is not None:
                self._clocks.sample()
            torch.cuda.synchronize(self.device)
            self.gaps = late
            if not late:
                break
            self._sleep = min(2 * max(host, self._sleep), self.LONGEST)
        self._round += count
        return [[a.elapsed_time(b) * 1e3 for a, b in pairs] for pairs in events]

    def _queue(
        self, works: Sequence[Work], count: int
    ) -> tuple[list[list[tuple[torch.cuda.Event, torch.cuda.Event]]], bool, float]:
        """Queues the rounds behind a sleeping kernel.

        Returns:
            The start and end events, whether the device woke before everything was queued, and the
            seconds that queueing took.
        """
        events = [
            [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in works
            ]
            for _ in range(count)
        ]
        awake = torch.cuda.Event()
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        torch.cuda._sleep(int(self._sleep * self._rate))
        awake.record()
        for i in range(count):
            for index in _order(len(works), self._round + i):
                work, (start, end) = works[index], events[i][index]
                work.prepare()
                if self._flush is not None:
                    self._flush()
                else:
                    work.call()
                    work.prepare()
                start.record()
                work.call()
                end.record()
        return events, awake.query(), time.perf_counter() - begin


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class Sampled:
    """The measurement of one case."""

    stats: dict[str, Stats]  #: by name of work
    gaps: bool  #: whether the times include gaps between launches
    faults: dict[str, float]  #: median number of page faults of a call; empty on CUDA


def sample(works: Sequence[Work], timer: Timer, seconds: float) -> Sampled:
    """Runs rounds for about that long, at least MIN_ROUNDS and at most MAX_ROUNDS of them. If the
    budget is used up (`seconds` <= 0) it runs HURRIED_ROUNDS."""
    least = MIN_ROUNDS if seconds > 0 else HURRIED_ROUNDS
    samples: list[list[float]] = []
    gaps = False
    with _no_garbage_collection(), timer.ready():
        timer.rounds(works, WARM_UP)
        timer.faults.clear()
        start = time.perf_counter()
        while len(samples) < MAX_ROUNDS and (
            len(samples) < least or time.perf_counter() - start < seconds
        ):
            samples += timer.rounds(works, timer.step)
            gaps |= timer.gaps
    stats = {w.name: describe([s[i] for s in samples]) for i, w in enumerate(works)}
    return Sampled(stats, gaps, {n: statistics.median(f) for n, f in timer.faults.items()})
