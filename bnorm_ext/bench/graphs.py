"""Times of short CUDA calls: many calls in one CUDA graph, which the host launches once.

METHOD describes it; the help and every JSON file contain this text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from .measure import CudaTimer, Stats, Work, sample
from .options import first_line

SHORT_US = 10.0  # a call that is faster is also timed in a graph
CALLS = 64  # of a graph

METHOD = f"""\
Short CUDA calls. A launch alone takes microseconds, so that events around one call say little about
a call of less than {SHORT_US:.0f} us. Where one median of a case is below that, all its calls are
also captured into CUDA graphs, {CALLS} times in a row, and the graphs replayed in rounds as above.
graph_us is the time of a replay over {CALLS}: the kernels, and what the device needs between two of
them, but no launch from the host. All calls of a graph but the first find what the call before has
left in the caches. So this column is warm, in a graph, whatever "cache" says, and tells nothing
about cold calls. A call that overwrites its input cannot follow itself and has no such time."""


@dataclasses.dataclass(frozen=True)
class Graphed:
    """Times per call, in a graph, by name of work; or why there is none."""

    stats: dict[str, Stats] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A context for the calls of a case. On CUDA it has a stream of its own: a graph captures no
    default stream, and backward runs on the stream on which forward was recorded."""
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def any_short(stats: Iterable[Stats]) -> bool:
    return any(s.median < SHORT_US for s in stats)


def capture(work: Work, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls. What a call allocates is freed before the next one, inside it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        for _ in range(CALLS):
            work.call()
    return graph


def _per_call(s: Stats) -> Stats:
    times = ("median", "p10", "p90", "first_half", "second_half")
    return dataclasses.replace(s, **{name: getattr(s, name) / CALLS for name in times})


def sample_short(
    works: Sequence[Work], timed: dict[str, Stats], device: torch.device, seconds: float
) -> Graphed:
    """Times the calls in graphs if one of the times that are known already is short.

    Call it within `own_stream`, in which the works were made.
    """
    if device.type != "cuda" or not any_short(timed.values()):
        return Graphed()
    graphs, reasons = [], {}
    for work in works:
        if not work.repeats:
            reasons[work.name] = "overwrites its input"
            continue
        try:
            graphs.append(Work(work.name, capture(work, device).replay))
        except Exception as why:  # another package may do what a graph cannot capture
            reasons[work.name] = first_line(why)
    if not graphs:
        return Graphed({}, reasons)
    found = sample(graphs, CudaTimer("warm", device), seconds)
    return Graphed({name: _per_call(s) for name, s in found.stats.items()}, reasons)
