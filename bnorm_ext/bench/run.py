"""Running the microbenchmarks: for each case the gate, the timing, and the rows of results."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import graphs, machine
from .cases import DTYPES, Case, bytes_floor, ceiling, ceiling_bytes
from .correct import CHECKED, Inputs, Results, make_inputs, reference, wrong
from .measure import CpuTimer, CudaTimer, Sampled, Stats, Timer, Work, sample, within_noise
from .options import first_line
from .providers import BASELINE, Layer, Provider, Unavailable

COPY = "copy"  #: the name of the copy ceiling, in place of a provider's
SHORT_SHARE = 0.25  #: of the seconds of a case: so many more, where its calls are timed in graphs
NOT_GRAPHED = graphs.Graphed()
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The result of the gate for one provider. `correct` is None if it could not run."""

    correct: bool | None
    reason: str | None = None


def check_memory(case: Case, device: torch.device, providers: int) -> None:
    """Raises ValueError if the tensors and the float64 reference would not fit into memory."""
    elements = math.prod(case.shape)
    needed = elements * (8 * 8 + DTYPES[case.dtype].itemsize * (4 + 2 * providers))
    machine.check_memory(str(case), needed, device)


def _leaves(i: Inputs, *, gradients: bool) -> tuple[Tensor, Tensor | None]:
    x = i.x.detach().requires_grad_(gradients)
    return x, None if i.residual is None else i.residual.detach().requires_grad_(gradients)


def _given(layer: Layer, x: Tensor) -> Tensor:
    """The input of forward: x, or a copy if forward overwrites it."""
    return x.clone() if layer.consumes_input else x


def _gradients(layer: Layer, y: Tensor, x: Tensor, r: Tensor | None, dy: Tensor, keep: bool) -> Any:
    to = [t for t in (x, r, layer.weight, layer.bias) if t is not None]
    return torch.autograd.grad(y, to, dy, retain_graph=keep)


def results(layer: Layer, case: Case, i: Inputs) -> Results:
    """The results of one pass, by name."""
    x, r = _leaves(i, gradients=case.training)
    with torch.set_grad_enabled(case.training):
        y = layer.forward(_given(layer, x), r)
    found = {"y": y.detach()}
    found |= zip(("running_mean", "running_var"), map(torch.clone, layer.buffers()), strict=True)
    if "bwd" in case.pass_:
        names = ["dx", *["dresidual"] * (r is not None), "dweight", "dbias"]
        found |= zip(names, _gradients(layer, y, x, r, i.dy, False), strict=True)
    return {name: t for name, t in found.items() if name in CHECKED[case.pass_]}


def gate(case: Case, i: Inputs, provider: Provider, right: Any) -> Verdict:
    """Runs a provider once and compares its results with the reference."""
    try:
        error = wrong(results(provider.layer(case, i), case, i), right)
    except Unavailable as why:
        return Verdict(None, str(why))
    except Exception as why:  # any error of another package is a reason, not our failure
        return Verdict(None, first_line(why))
    return Verdict(error is None, error)


def work(provider: Provider, case: Case, i: Inputs) -> Work:
    """The call that is timed."""
    layer = provider.layer(case, i)
    x, r = _leaves(i, gradients=case.training)
    given, repeats = x, not layer.consumes_input

    def refresh() -> None:
        nonlocal given
        given = _given(layer, x)

    if case.pass_ == "eval":

        def inference() -> Tensor:
            with torch.no_grad():
                return layer.forward(given, r)

        return Work(provider.name, inference, refresh, repeats)
    if case.pass_ == "fwd":
        return Work(provider.name, lambda: layer.forward(given, r), refresh, repeats)
    if case.pass_ == "fwd+bwd":

        def step() -> tuple[Tensor, Any]:
            y = layer.forward(given, r)
            return y, _gradients(layer, y, x, r, i.dy, False)

        return Work(provider.name, step, refresh, repeats)
    y = layer.forward(_given(layer, x), r)

    def again() -> None:
        nonlocal y
        if layer.consumes_input:  # then backward overwrites what forward has saved
            y = layer.forward(_given(layer, x), r)

    return Work(provider.name, lambda: _gradients(layer, y, x, r, i.dy, True), again, repeats)


def copy_work(case: Case, i: Inputs) -> Work:
    """The call of the copy ceiling. Its outputs are allocated and kept like those of a provider."""
    sources = itertools.cycle((i.x, i.dy))
    calls = [
        functools.partial(_copy, (source,) if name == "clone" else (i.x, i.dy))
        for name, source in zip(ceiling(case), sources, strict=False)
    ]
    return Work(COPY, lambda: [call() for call in calls])


def _copy(sources: tuple[Tensor, ...]) -> Tensor:
    if sources[0].is_cuda:
        return sources[0].clone() if len(sources) == 1 else sources[0] + sources[1]
    out = machine.in_huge_pages(torch.empty_like(sources[0]))
    return out.copy_(sources[0]) if len(sources) == 1 else torch.add(*sources, out=out)


def _round(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def make_row(
    case: Case,
    where: Row,
    provider: str,
    verdict: Verdict,
    sampled: Sampled,
    base: Stats | None,
    graphed: graphs.Graphed = NOT_GRAPHED,
) -> Row:
    """One row of the results. `base`: the times of the baseline; None if its results are wrong."""
    stats, copy = sampled.stats.get(provider), sampled.stats.get(COPY)
    moved = ceiling_bytes(case) if provider == COPY else bytes_floor(case)
    row: Row = {
        **where,
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": list(case.shape),
        "op": case.op,
        "pass": case.pass_,
        "provider": provider,
        **dict.fromkeys(("median_us", "p10_us", "p90_us")),
        "bytes_floor": moved,
        **dict.fromkeys(("gbps", "copy_fraction")),
        "correct": verdict.correct,
        "reason": verdict.reason,
        **dict.fromkeys(("ratio", "noisy", "first_half_us", "second_half_us", "rounds")),
        "page_faults": sampled.faults.get(provider),
        "launch_gaps": sampled.gaps,
        **dict.fromkeys(("graph_us", "graph_p10_us", "graph_p90_us", "graph_ratio")),
        "graph_reason": graphed.reasons.get(provider),
        "count": case.count,
        "layer": case.layer,
    }
    if stats is None:
        return row
    gbps = moved / stats.median / 1e3
    row |= {
        "median_us": _round(stats.median, 6),
        "p10_us": _round(stats.p10, 6),
        "p90_us": _round(stats.p90, 6),
        "gbps": _round(gbps),
        "first_half_us": _round(stats.first_half, 6),
        "second_half_us": _round(stats.second_half, 6),
        "rounds": stats.rounds,
    }
    if copy is not None:
        row["copy_fraction"] = _round(gbps / (ceiling_bytes(case) / copy.median / 1e3))
    short = graphed.stats.get(provider)
    if short is not None:
        times = {"": short.median, "_p10": short.p10, "_p90": short.p90}
        row |= {f"graph{name}_us": _round(us, 6) for name, us in times.items()}
    if verdict.correct:
        row |= compared(stats, base, provider)
        short_base = graphed.stats.get(BASELINE)
        if base is not None and short is not None and short_base is not None:
            row["graph_ratio"] = _round(short_base.median / short.median)
    return row


def compared(mine: Stats, base: Stats | None, provider: str) -> Row:
    """The time of the baseline / this time, and whether the difference is within noise."""
    if base is None:
        return {}
    noisy = None if provider == BASELINE else within_noise(mine, base)
    return {"ratio": _round(base.median / mine.median), "noisy": noisy}


def _timer(device: torch.device, cache: str) -> Timer:
    return CudaTimer(cache, device) if device.type == "cuda" else CpuTimer(cache)


def measure(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    caches: Sequence[str],
    seconds: float,
) -> Iterator[tuple[Case, list[Row]]]:
    """Yields the rows of each case once they are measured. The remaining seconds are divided evenly
    among the remaining cases."""
    end = time.perf_counter() + seconds
    left = len(cases) * len(caches)
    for cache in caches:
        timer = _timer(device, cache)
        where = {
            "device": device.type,
            "device_name": machine.device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "cache": cache,
        }
        for _, group in itertools.groupby(cases, key=lambda c: c.group):
            members = list(group)
            inputs, verdicts = _gated(members, providers, device)
            for case in members:
                share = (end - time.perf_counter()) / left
                with graphs.own_stream(device):
                    timed, graphed = _timed(case, inputs, providers, verdicts, timer, share, device)
                left -= 1
                right = verdicts.get((case.pass_, BASELINE), Verdict(None)).correct
                base = timed.stats.get(BASELINE) if right else None
                rows = [make_row(case, where, COPY, Verdict(None), timed, base, graphed)]
                for p in providers:
                    said = verdicts[case.pass_, p.name]
                    rows.append(make_row(case, where, p.name, said, timed, base, graphed))
                yield case, rows


def _timed(
    case: Case,
    inputs: Inputs,
    providers: Sequence[Provider],
    verdicts: dict[tuple[str, str], Verdict],
    timer: Timer,
    seconds: float,
    device: torch.device,
) -> tuple[Sampled, graphs.Graphed]:
    """The times of the copy and of the providers that the gate lets through. One that fails here
    gets another verdict."""
    works = [copy_work(case, inputs)]
    for p in providers:
        key = case.pass_, p.name
        if verdicts[key].correct is None:
            continue
        try:
            works.append(_tried(work(p, case, inputs)))
        except Exception as why:  # it may fail although the gate has passed
            verdicts[key] = Verdict(None, first_line(why))
    timed = sample(works, timer, seconds)
    return timed, graphs.sample_short(works, timed.stats, device, SHORT_SHARE * seconds)


def _tried(w: Work) -> Work:
    for _ in range(2):
        w.prepare()
        w.call()
    return w


def _gated(
    cases: Sequence[Case], providers: Sequence[Provider], device: torch.device
) -> tuple[Inputs, dict[tuple[str, str], Verdict]]:
    """The tensors that these cases share, and the verdict of the gate by (pass, provider)."""
    inputs = make_inputs(cases[0], device)
    verdicts = {}
    # Training first, because its reference sets dy to 0 in places.
    for case in sorted(cases, key=lambda c: not c.training):
        right = reference(case, inputs, training=case.training)
        for provider in providers:
            verdicts[case.pass_, provider.name] = gate(case, inputs, provider, right)
    return inputs, verdicts
