"""Microbenchmarks: the time of one batch norm, torch's and others', and the copy ceiling."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cases, clocks, compare, graphs, machine, measure, packages, providers, report, run
from .options import (
    DAY,
    PROGRAMS,
    Parser,
    check_output,
    device_of,
    first_line,
    import_pictures,
    names,
    positive,
    shape_of,
    threads,
    whole,
)

DESCRIPTION = "Times batch norm against torch's, other packages' and the copy ceiling."
METHOD = f"{measure.METHOD}\n{graphs.METHOD}"
BATCH = 32
QUICK_SECONDS = 75.0
SECONDS_PER_CASE = 3.0
#: The fraction of the time budget that torch.compile may compile, in a run that did not name it.
COMPILE_SHARE = 0.2
BUSY = 0.7  # load average of the last minute, above what starting Python causes
ALIASES = {short: name for name, short in report.SHORT.items()}


def parser(command: str) -> Parser:
    p = Parser(
        prog=command,
        description=DESCRIPTION,
        epilog=f"Other programs: {', '.join(PROGRAMS)}, each with a --help.\n\n"
        "How it is measured.\n\n" + METHOD,
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
    add("--batch", type=whole(16), metavar="N", help=f"of suites, at least 16; default: {BATCH}")
    add("--json", type=Path, metavar="FILE", help="writes header and rows")
    add("--plot", type=Path, metavar="FILE.png", help="or .svg, .pdf, ...: for a net the speed-up "
        "by layer, else the fraction of copy bandwidth against size")  # fmt: skip
    add("--compare", type=Path, nargs="+", metavar="JSON", help="OLD: shows what changed since; "
        "OLD NEW: compares two files and measures nothing")  # fmt: skip
    add("--threads", type=threads, metavar="K", help="of the CPU; default: torch's")
    add("--time-budget", type=positive(DAY), metavar="SECONDS", help="spread over the cases; "
        f"default: {QUICK_SECONDS:.0f} for quick, else {SECONDS_PER_CASE:.0f} a case")  # fmt: skip
    return p


def _base(options: argparse.Namespace, device: str) -> list[cases.Case]:
    if options.shape:
        if options.suite is not None or options.batch is not None:
            raise ValueError("--shape excludes --suite and --batch")
        shapes = map(shape_of, options.shape)
        return [cases.Case(shape, pass_=p) for shape in shapes for p in ("fwd", "bwd")]
    name = "quick" if options.suite is None else options.suite
    if name not in cases.SUITES:
        raise ValueError(f"--suite: unknown {name!r}; there are {', '.join(cases.SUITES)}")
    return cases.suite(name, device, BATCH if options.batch is None else options.batch)


def _cases(options: argparse.Namespace, device: str) -> list[cases.Case]:
    chosen = (
        names(options.dtype, "--dtype", tuple(cases.DTYPES), ALIASES),
        names(options.layout, "--layout", cases.LAYOUTS),
        names(options.op, "--op", cases.OPS),
        names(options.passes, "--pass", cases.PASSES),
    )
    possible = []
    for case in cases.expand(_base(options, device), *chosen):
        try:
            cases.check(case)
        except cases.ImpossibleCase:
            if options.shape:
                raise
            continue  # the cases of a suite that are possible are measured
        possible.append(case)
    if not possible:
        raise ValueError("no shape of this suite can be measured so")
    return possible


def _providers(
    options: argparse.Namespace, device: str, planned: list[cases.Case], seconds: float
) -> list[providers.Provider]:
    named = names(options.provider, "--provider", packages.NAMES)
    if not named:
        chosen = packages.make(packages.available(device, {c.op for c in planned}))
        for provider in chosen:
            if isinstance(provider, providers.Compiled):
                provider.allowance = COMPILE_SHARE * seconds
        return chosen
    absent = packages.absent(named, device)
    if len(absent) == len(named):
        raise ValueError(f"--provider: {'; '.join(absent)}")
    return packages.make(named)


def _plan(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[cases.Case], list[providers.Provider], list[str], float]:
    """Cases, providers, states of the cache, and seconds. Raises ValueError if a case or a provider
    is impossible."""
    planned = _cases(options, device.type)
    caches = names(options.cache, "--cache", (*measure.CACHES, "both"))
    caches = list(measure.CACHES) if "both" in caches else caches or ["cold"]
    seconds = options.time_budget
    if seconds is None:
        quick = not options.shape and options.suite in (None, "quick")
        seconds = QUICK_SECONDS if quick else SECONDS_PER_CASE * len(planned) * len(caches)
    chosen = _providers(options, device.type, planned, seconds)
    for case in planned:
        run.check_memory(case, device, len(chosen))
    return planned, chosen, caches, seconds


def _versions() -> dict[str, str]:
    """The version of every provider, or why it is unavailable."""
    found = {}
    for provider in packages.make(packages.NAMES):
        try:
            found[provider.name] = provider.version()
        except providers.Unavailable as why:
            found[provider.name] = f"unavailable: {why}"
    return found


def _check_files(options: argparse.Namespace) -> None:
    check_output(options.json, "--json")
    if options.plot is None:
        return
    report.check_picture(options.plot, "--plot")
    if options.json is not None and options.json.resolve() == options.plot.resolve():
        raise ValueError("--json and --plot name the same file")
    import_pictures()  # here, so that it does not fail after minutes of measuring


def _only_compares(p: Parser, options: argparse.Namespace) -> bool:
    """Whether two files are compared and nothing is measured. Raises ValueError if other options
    contradict that."""
    if len(options.compare or ()) < 2:
        return False
    if len(options.compare) > 2:
        raise ValueError("--compare: one file or two")
    if [name for name, value in vars(options).items() if name != "compare" and value is not None]:
        raise ValueError("--compare of two files measures nothing: it excludes other options")
    return True


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}"
    machine.fresh_outputs(True)  # before anything large is allocated
    p = parser(command)
    options = p.parse_args(arguments)
    try:
        compares = _only_compares(p, options)
        old = [report.read_json(path) for path in options.compare or ()]
        if compares:
            print(compare.report(*old))
            return 0
        _check_files(options)
        device = device_of(options.device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        planned, chosen, caches, seconds = _plan(options, device)
    except ValueError as error:
        p.error(str(error))
    header = machine.header(device, command, arguments)
    header["providers"] = _versions()
    header["suite"] = None if options.shape else options.suite or "quick"
    header["method"] = METHOD
    load = header["machine"]["load_average_at_start"]
    if device.type == "cpu" and load is not None and load > BUSY:
        print(f"other work is running (load average {load:.1f}): noisy times", file=sys.stderr)
    rows: list[run.Row] = []
    problem = _measure(planned, chosen, device, caches, seconds, rows)
    header["interrupted"] = problem is not None
    clocks.record(header, device)
    print(report.title(header), report.table(rows), sep="\n\n")
    if line := clocks.sentence(header):
        print(line)
    for name, version in header["providers"].items():
        if version.startswith("unavailable") and options.provider is None:
            print(f"{name}: {version}")
    if old:
        print("\n" + compare.report(old[0], (header, rows)))
    try:
        if options.json is not None:
            report.write_json(options.json, header, rows)
        if options.plot is not None and rows:
            import_pictures().draw(header, rows, options.plot)
    except OSError as error:  # such as a full disk: the table was printed already
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return 0 if problem is None else problem


def _measure(
    planned: list[cases.Case],
    chosen: list[providers.Provider],
    device: torch.device,
    caches: list[str],
    seconds: float,
    rows: list[run.Row],
) -> int | None:
    """Fills rows. Returns the exit code if it ended early, and keeps the rows up to then."""
    # SIGTERM is treated like Ctrl-C, so that the rows are kept then too.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with report.Progress(len(planned) * len(caches), "measuring") as progress:
        try:
            for case, found in run.measure(planned, chosen, device, caches, seconds):
                rows += found
                progress.step(report.one_line(case, found))
        except KeyboardInterrupt:
            print("interrupted; what follows was measured before", file=sys.stderr)
            return 130
        except (MemoryError, RuntimeError) as error:
            if not machine.is_out_of_memory(error):
                raise
            print(
                f"out of memory; what follows was measured before: {first_line(error)}",
                file=sys.stderr,
            )
            return 1
    return None
