"""A training step end to end, with torch's batch norm and with ours; or a step of inference.

Variants: native (nn.BatchNorm2d), converted (bnorm_ext.convert_batchnorm), fused (activation and
addition taken into it too). All start from the same weights and take the same step in turn, so
that whatever else the machine does slows all alike. A training step: forward, loss, backward, SGD.
With --inference: forward in evaluation mode, under torch.inference_mode. images/s: batch over the
median step. Peak memory: what tensors hold in one step, over what was there before it. Batch norm:
its own time (and that of what is fused with it) in the operators of a step, and its share; on CUDA,
of kernels, by the profiler; medians of five more steps with every operator timed. They come last,
when the allocator has the memory that a step needs. Faults: minor page faults of the process in a
step; profiled: in one of those. Where they differ, the own time is not that of a timed step.

With --processes N, each variant runs N times in a process of its own. The processes alternate, and
the ratios are those of processes of the same round: medians and quartiles.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import clocks, machine, nets, processes, report, steps
from .measure import Stats, describe, page_faults, within_noise
from .options import (
    DAY,
    Parser,
    check_output,
    device_of,
    first_line,
    names,
    positive,
    threads,
    whole,
)
from .profiled import Own, peak_bytes, times
from .providers import Unavailable
from .steps import VARIANTS

WARM_UP, MIN_STEPS = 2, 5
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class Run:
    """One variant of the model, and its measurements."""

    name: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    faults: list[int] = field(default_factory=list)  # page faults of each timed step
    own: Own | None = None


def warm_up(runs: list[Run], reasons: dict[str, str]) -> None:
    """Takes the first steps. A run that fails is removed from `runs`, its reason in `reasons`."""
    for run in list(runs):
        try:
            for _ in range(WARM_UP):
                run.step()
            print(f"{run.name}: warmed up", file=sys.stderr)
        except Exception as why:  # no compiler, not enough memory, ...
            reasons[run.name] = first_line(why)
            runs.remove(run)


def inspect(runs: Sequence[Run], device: torch.device, compiled: bool) -> None:
    """Memory, and batch norm's own time unless it is compiled into one kernel with its neighbours.
    After the timed steps: the first steps of a process take fresh memory from the system for its
    largest tensors, batch norm's among them."""
    for run in runs:
        if not compiled:
            run.own = times(run.step, device)
        run.peak_bytes = peak_bytes(run.step, device)


def measure(runs: Sequence[Run], seconds: float) -> None:
    """Times steps until the time is up; the runs take turns."""
    end = time.perf_counter() + seconds
    while len(runs[0].seconds) < MIN_STEPS or time.perf_counter() < end:
        # The order alternates, so that no run is always first.
        for run in runs if len(runs[0].seconds) % 2 == 0 else list(reversed(runs)):
            faults = page_faults()
            start = time.perf_counter()
            run.step()
            run.seconds.append(time.perf_counter() - start)
            run.faults.append(page_faults() - faults)


def rows(runs: Sequence[Run], reasons: dict[str, str], batch: int) -> list[dict[str, Any]]:
    """One row for each variant, also for those that could not run."""
    base: Stats | None = None
    found = []
    for run in runs:
        # After an interruption some runs have a step more than others.
        samples = run.seconds[: min(len(r.seconds) for r in runs)]
        if not samples:
            continue
        s = describe([1e6 * t for t in samples])
        base = s if run.name == "native" else base
        own = run.own
        found.append(
            {
                "variant": run.name,
                "median_us": round(s.median, 1),
                "p10_us": round(s.p10, 1),
                "p90_us": round(s.p90, 1),
                "steps": s.rounds,
                "images_per_second": round(batch / s.median * 1e6, 2),
                "ratio": round(base.median / s.median, 4) if base else None,
                "noisy": within_noise(s, base) if base and s is not base else None,
                "peak_bytes": run.peak_bytes,
                "faults_per_step": statistics.median(run.faults),
                "faults_per_profiled_step": own and own.faults,
                "batch_norm_share": own and round(own.share, 4),
                "batch_norm_us": own and round(own.batch_norm_us, 1),
                "reason": None,
            }
        )
    return found + [{"variant": name, "reason": reason} for name, reason in reasons.items()]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text, and below them the reasons of variants that could not run."""
    lines = [["variant", "ms a step", "p10", "p90", "images/s", "native / it", "peak, MB",
              "batch norm", "steps"]]  # fmt: skip
    for r in found:
        if r["reason"] is None:
            ratio = "-" if r["ratio"] is None else f"{r['ratio']:.3f}{'~' if r['noisy'] else ''}"
            peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.0f}"
            part = "-" if r["batch_norm_share"] is None else f"{100 * r['batch_norm_share']:.1f} %"
            times = [f"{r[name] / 1e3:.1f}" for name in ("median_us", "p10_us", "p90_us")]
            speed = f"{r['images_per_second']:.1f}"
            lines.append([r["variant"], *times, speed, ratio, peak, part, str(r["steps"])])
    text = report.aligned(lines, left=1)
    if any(r.get("noisy") for r in found):
        text += ["", "~  the two halves of the samples differ by more than the claimed difference"]
    return "\n".join([*text, *(f"{r['variant']}: {r['reason']}" for r in found if r["reason"])])


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--model", choices=tuple(nets.NETS), default="resnet18")
    add("--variant", nargs="+", metavar="V", help=f"{', '.join(VARIANTS)}; default: all")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--batch", type=whole(1), help="images in a step; default: 64, on the CPU 8")
    add("--size", type=whole(32), default=224, help="height and width of an image; default: 224")
    add("--amp", nargs="?", const="half", choices=("half", *AMP),
        help="autocast; default of the dtype: float16, on the CPU bfloat16")  # fmt: skip
    add("--channels-last", action="store_true")
    add("--inference", action="store_true", help="measure inference, not training")
    add("--compile", nargs="?", const="default", choices=MODES,
        help="torch.compile(model), in this mode")  # fmt: skip
    add("--threads", type=threads, metavar="K", help="of the CPU; default: torch's")
    add("--time-budget", type=positive(DAY), default=60.0, metavar="SECONDS",
        help="of timed steps; default: 60")  # fmt: skip
    add("--processes", type=whole(1, 1000), metavar="N",
        help="each variant in N processes of its own, each with the time budget")  # fmt: skip
    add("--json", type=Path, metavar="FILE")
    return p


def check(
    model: str, batch: int, size: int, device: torch.device, *, training: bool = True
) -> None:
    """Raises ValueError if the net cannot take such a batch, or it would not fit into memory."""
    shapes = [shape for _, shape in nets.batch_norm_inputs(model, batch, size, training=training)]
    # A lower bound: input and output in float32, in training of all batch norms at once.
    held = (sum if training else max)(math.prod(shape) for shape in shapes)
    what = f"{model} with {batch} images of {size}x{size}"
    machine.check_memory(what, 2 * 4 * held, device)


def written(file: Path | None, header: dict[str, Any], found: Any, command: str) -> bool:
    """Writes the results, if a file was asked for; False where that fails."""
    if file is None:
        return True
    try:
        report.write_json(file, header, found)
    except OSError as error:  # such as a full disk: the table was printed already
        print(f"{command}: {error}", file=sys.stderr)
        return False
    return True


def subject(o: Any, model: str, batch: int) -> str:
    """What is measured, as the title of the table."""
    what = "inference" if o.inference else "training"
    return f"{what}: {model}, {batch} images of {o.size}x{o.size}"


def alternate(
    o: Any, chosen: list[str], device: torch.device, batch: int, arguments: list[str], command: str
) -> int:
    """--processes: the same measurement in processes that alternate."""
    passed = ["--model", o.model, "--device", device.type, "--batch", str(batch)]
    passed += ["--size", str(o.size), "--time-budget", str(o.time_budget)]
    passed += [] if o.threads is None else ["--threads", str(o.threads)]
    passed += [] if o.amp is None else ["--amp", o.amp]
    passed += [] if o.compile is None else ["--compile", o.compile]
    passed += ["--channels-last"] * o.channels_last + ["--inference"] * o.inference
    found = processes.rounds(chosen, passed, o.processes)
    interrupted = len(found) < o.processes or len(found[-1]) < len(chosen)
    rows = processes.summary(chosen, found)
    header = machine.header(device, command, arguments)
    header |= {"model": o.model, "batch": batch, "size": o.size, "processes": o.processes}
    header |= {"inference": o.inference, "method": __doc__, "interrupted": interrupted}
    header |= {"rounds": found}
    print(f"{subject(o, o.model, batch)}\n{report.title(header)}\n")
    print(processes.table(rows))
    if not written(o.json, header, rows, command):
        return 1
    return 130 if interrupted else 0 if any(r["reason"] is None for r in rows) else 1


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}.train"
    p = parser(command)
    o = p.parse_args(arguments)
    try:
        chosen = names(o.variant, "--variant", VARIANTS) or list(VARIANTS)
        check_output(o.json, "--json")
        device = device_of(o.device)
        batch = o.batch if o.batch is not None else 64 if device.type == "cuda" else 8
        check(o.model, batch, o.size, device, training=not o.inference)
    except ValueError as error:
        p.error(str(error))
    if o.processes is not None:
        return alternate(o, chosen, device, batch, arguments, command)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    net, source = nets.build(o.model)
    images, labels = torch.randn(batch, 3, o.size, o.size), torch.randint(1000, (batch,))
    net.train(not o.inference).to(device)
    images, labels = images.to(device), labels.to(device)
    if o.channels_last:
        last: Any = {"memory_format": torch.channels_last}
        net, images = net.to(**last), images.to(**last)
    half = "bfloat16" if device.type == "cpu" else "float16"
    amp = None if o.amp is None else AMP[half if o.amp == "half" else o.amp]
    runs, reasons = [], {}
    for name in chosen:
        try:
            model = steps.convert(name, net)
            if o.inference:
                step = steps.inference_step(model, images, amp=amp, mode=o.compile)
            else:
                step = steps.training_step(model, images, labels, amp=amp, mode=o.compile)
            runs.append(Run(name, step))
        except Exception as why:
            reasons[name] = str(why) if isinstance(why, Unavailable) else first_line(why)
    interrupted = False
    try:
        warm_up(runs, reasons)
        if runs:
            with clocks.sampling(device):
                measure(runs, o.time_budget)
        inspect(runs, device, o.compile is not None)
    except KeyboardInterrupt:
        interrupted = True
    found = rows(runs, reasons, batch)
    header = machine.header(device, command, arguments)
    header |= {"model": o.model, "net_from": source, "batch": batch, "size": o.size}
    header |= {"inference": o.inference, "method": __doc__, "interrupted": interrupted}
    clocks.record(header, device)
    print(f"{subject(o, f'{o.model} ({source})', batch)}\n{report.title(header)}\n")
    print(table(found))
    if line := clocks.sentence(header):
        print(line)
    if not written(o.json, header, found, command):
        return 1
    return 130 if interrupted else 0 if runs else 1


if __name__ == "__main__":
    sys.exit(main())
