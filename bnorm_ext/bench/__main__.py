"""`python -m bench`: times of batch norm beside torch's and the copy ceiling."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import cases, compare, machine, measure, packages, providers, report, run

DESCRIPTION = "Times batch norm against torch's, other packages' and the copy ceiling."
QUICK_SECONDS = 75.0
SECONDS_PER_CASE = 3.0
#: Of the time budget, what torch.compile may take to compile in a run that did not ask for it.
COMPILE_SHARE = 0.2
BUSY = 0.7  # load average of the last minute; what starting Python leaves is less
ALIASES = {short: name for name, short in report.SHORT.items()}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def listed(values: Sequence[str] | None) -> list[str]:
    """Values that are separated by spaces, commas or both."""
    return [part for value in values or () for part in value.split(",") if part]


def _names(values: Sequence[str] | None, what: str, known: Sequence[str]) -> list[str]:
    names = [ALIASES.get(name, name) for name in listed(values)]
    for name in names:
        if name not in known:
            raise ValueError(f"--{what}: unknown {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def shape_of(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f"--shape {text}: must be numbers such as 32,64,56,56") from None


def parser() -> Parser:
    p = Parser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog="How it is measured.\n\n" + measure.METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--suite", help=f"{', '.join(cases.SUITES)}; default: quick")
    add("--shape", nargs="+", metavar="N,C,H,W", help="instead of a suite")
    add("--dtype", nargs="+", metavar="D", help=", ".join(cases.DTYPES))
    add("--layout", nargs="+", metavar="L", help=", ".join(cases.LAYOUTS))
    add("--op", nargs="+", metavar="OP", help=", ".join(cases.OPS))
    add("--pass", nargs="+", dest="passes", metavar="PASS", help=", ".join(cases.PASSES))
    add("--provider", nargs="+", metavar="P", help=", ".join(packages.NAMES))
    add("--cache", nargs="+", metavar="STATE", help="cold, warm or both; default: cold")
    add("--batch", type=int, default=32, help="N of suites; default: 32")
    add("--json", type=Path, metavar="FILE", help="writes header and rows")
    add("--plot", type=Path, metavar="FILE.png", help="for a net the speed-up by layer, else the "
        "fraction of copy bandwidth against size")  # fmt: skip
    add("--compare", type=Path, nargs="+", metavar="JSON", help="OLD: shows what changed since; "
        "OLD NEW: compares two files and measures nothing")  # fmt: skip
    add("--threads", type=int, metavar="K", help="of the CPU; default: torch's")
    add("--time-budget", type=float, metavar="SECONDS", help="spread over the cases; default: "
        f"{QUICK_SECONDS:.0f} for quick, else {SECONDS_PER_CASE:.0f} a case")  # fmt: skip
    return p


def device_of(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        )
        raise ValueError(f"--device cuda: there is no CUDA device ({why})")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _cases(options: argparse.Namespace, device: str) -> list[cases.Case]:
    chosen = (
        _names(options.dtype, "dtype", tuple(cases.DTYPES)),
        _names(options.layout, "layout", cases.LAYOUTS),
        _names(options.op, "op", cases.OPS),
        _names(options.passes, "pass", cases.PASSES),
    )
    if options.shape:
        if options.suite:
            raise ValueError("--shape and --suite exclude each other")
        base = [cases.Case(shape_of(s), pass_=p) for s in options.shape for p in ("fwd", "bwd")]
    else:
        name = options.suite or "quick"
        if name not in cases.SUITES:
            raise ValueError(f"--suite: unknown {name!r}; there are {', '.join(cases.SUITES)}")
        if options.batch < 16:
            raise ValueError("--batch: suites need at least 16")
        base = cases.suite(name, device, options.batch)
    found = cases.expand(base, *chosen)
    possible = []
    for case in found:
        try:
            cases.check(case)
        except cases.ImpossibleCase:
            if options.shape:
                raise
            continue  # a suite is measured as far as it goes
        possible.append(case)
    if not possible:
        raise ValueError("no shape of this suite can be measured so")
    return possible


def _plan(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[cases.Case], list[providers.Provider], list[str], float]:
    """Cases, providers, states of the cache, seconds. Raises ValueError for what cannot be."""
    planned = _cases(options, device.type)
    names = _names(options.provider, "provider", packages.NAMES)
    chosen = packages.make(names or packages.available(device.type, {c.op for c in planned}))
    caches = _names(options.cache, "cache", (*measure.CACHES, "both"))
    caches = list(measure.CACHES) if "both" in caches else caches or ["cold"]
    for case in planned:
        run.check_memory(case, device, len(chosen))
    seconds = options.time_budget
    if seconds is None:
        quick = not options.shape and options.suite in (None, "quick")
        seconds = QUICK_SECONDS if quick else SECONDS_PER_CASE * len(planned) * len(caches)
    if seconds <= 0:
        raise ValueError("--time-budget: must be positive")
    for provider in chosen:
        if isinstance(provider, providers.Compiled) and not names:
            provider.allowance = COMPILE_SHARE * seconds
    return planned, chosen, caches, seconds


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Of every provider, or why there is none."""
    found = {}
    for provider in packages.make(list(names)):
        try:
            found[provider.name] = provider.version()
        except providers.Unavailable as why:
            found[provider.name] = f"unavailable: {why}"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    machine.fresh_outputs(True)  # before anything large was allocated
    p = parser()
    options = p.parse_args(arguments)
    try:
        if options.compare and len(options.compare) > 2:
            raise ValueError("--compare: one file or two")
        old = [report.read_json(path) for path in options.compare or ()]
        if len(old) == 2:
            print(compare.report(*old))
            return 0
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError("--threads: at least 1")
            torch.set_num_threads(options.threads)
        device = device_of(options.device)
        plan = _plan(options, device)
        report.check_folder(options.json, "--json")
        report.check_folder(options.plot, "--plot")
        if options.plot is not None:
            from . import plots  # matplotlib, here already: not after minutes of measuring
    except ValueError as error:
        p.error(str(error))
    except ImportError as error:
        p.error(f"--plot: {error}; pip install matplotlib")
    planned, chosen, caches, seconds = plan
    header = machine.header(device, "bench", arguments)
    header["providers"] = _versions(packages.NAMES)
    header["suite"] = None if options.shape else options.suite or "quick"
    header["method"] = measure.METHOD
    load = header["machine"]["load_average_at_start"]
    if device.type == "cpu" and load is not None and load > BUSY:
        print(f"other work is running (load average {load:.1f}): noisy times", file=sys.stderr)
    rows: list[run.Row] = []
    header["interrupted"] = not _measure(planned, chosen, device, caches, seconds, rows)
    print(report.title(header), report.table(rows), sep="\n\n")
    for name, version in header["providers"].items():
        if version.startswith("unavailable") and not listed(options.provider):
            print(f"{name}: {version}")
    if options.json is not None:
        report.write_json(options.json, header, rows)
    if options.plot is not None and rows:
        plots.draw(header, rows, options.plot)
    if old:
        print("\n" + compare.report(old[0], (header, rows)))
    return 130 if header["interrupted"] else 0


def _measure(
    planned: list[cases.Case],
    chosen: list[providers.Provider],
    device: torch.device,
    caches: list[str],
    seconds: float,
    rows: list[run.Row],
) -> bool:
    """Fills rows. False where it was interrupted; the rows up to then stay."""
    # Asked to end in other ways than by Ctrl-C, the same: what is there is kept.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with report.Progress(len(planned) * len(caches), "measuring") as progress:
        try:
            for case, found in run.measure(planned, chosen, device, caches, seconds):
                rows += found
                progress.step(report.one_line(case, found))
        except KeyboardInterrupt:
            print("interrupted; what follows was measured before", file=sys.stderr)
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
