"""Output of results: as a table, as JSON, and as progress while measuring."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .options import check_output, write
from .providers import BASELINE
from .run import COPY, Row

SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def case_key(row: Row) -> tuple[Any, ...]:
    """Identifies a measurement: the same for the rows of all providers."""
    fields = ("device", "cache", "dtype", "layout", "op", "pass")
    return tuple(row["shape"]), *(row[name] for name in fields)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def number(us: float) -> str:
    """Microseconds with four digits."""
    return f"{us:,.0f}" if us >= 1000 else f"{us:.4g}"


def columns(rows: Sequence[Row]) -> list[str]:
    """Providers in the order of the rows, without those that could run no case."""
    timed = {r["provider"] for r in rows if r["median_us"] is not None}
    return [p for p in dict.fromkeys(r["provider"] for r in rows) if p in timed and p != COPY]


def _cell(row: Row | None, notes: dict[str, str]) -> str:
    if row is None:
        return "-"
    if row["correct"] is None:
        return "-" + notes[row["reason"]]
    if not row["correct"]:
        return "wrong" + notes[row["reason"]]
    return number(row["median_us"]) + ("~" if row["noisy"] else "")


def _graph_cell(row: Row | None) -> str:
    us = row.get("graph_us") if row and row["correct"] else None
    return "-" if us is None else number(us)


def subject(rows: Sequence[Row]) -> str:
    """The provider whose GB/s, fraction and ratio the table shows: the first but the baseline."""
    found = columns(rows)
    return next((p for p in found if p != BASELINE), BASELINE)


def table(rows: Sequence[Row]) -> str:
    """One line for each case, then geometric means and the meaning of marks."""
    if not rows:
        return "Nothing was measured."
    shown, chosen = columns(rows), subject(rows)
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), {})[row["provider"]] = row
    reasons = [r["reason"] for r in rows if r["reason"] and r["provider"] in shown]
    notes = {text: f"[{i}]" for i, text in enumerate(dict.fromkeys(reasons), 1)}
    names = ["shape", "dtype", "layout", "op", "pass", "cache", *(f"{p}, us" for p in shown)]
    in_graphs = any(r.get("graph_us") for r in rows)
    last = [*(f"{p}, graph us" for p in shown), "graph ratio"] if in_graphs else []
    lines = [[*names, "copy, us", "GB/s", "% of copy", "ratio", *last]]
    for key, found in cases.items():
        shape, _, cache, dtype, layout, op, pass_ = key
        copy, mine = found.get(COPY), found.get(chosen)
        line = ["x".join(map(str, shape)), SHORT[dtype], layout, op, pass_, cache]
        line += [_cell(found.get(p), notes) for p in shown]
        line.append(number(copy["median_us"]) if copy else "-")
        if mine and mine["correct"]:
            ratio = "-" if mine["ratio"] is None else f"{mine['ratio']:.2f}"
            fraction = mine["copy_fraction"]
            line += [f"{mine['gbps']:.1f}", "-" if fraction is None else f"{100 * fraction:.0f}"]
            line.append(ratio + ("~" if mine["noisy"] else ""))
        else:
            line += ["-"] * 3
        if in_graphs:
            line += [_graph_cell(found.get(p)) for p in shown]
            short = mine and mine.get("graph_ratio")
            line.append(f"{short:.2f}" if short else "-")
        lines.append(line)
    text = [*aligned(lines, left=6), "", f"GB/s, % of copy and ratio are {chosen}'s."]
    text += ["", *_means(rows, shown)]
    text += ["", *_legend(rows, notes)]
    return "\n".join(text).rstrip()


def aligned(lines: list[list[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def _means(rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    """Geometric means of the ratios to the baseline by provider and pass, over the results that are
    right and were timed."""
    passes = list(dict.fromkeys(r["pass"] for r in rows))
    lines = [[f"geometric mean, {BASELINE} / provider", *passes, "all", "% of copy", "cases"]]
    for provider in shown:
        mine = [r for r in rows if r["provider"] == provider and r["ratio"] is not None]
        groups = [[r["ratio"] for r in mine if r["pass"] == p] for p in passes]
        groups.append([r["ratio"] for r in mine])
        line = [provider, *(f"{geometric_mean(g):.2f}" if g else "-" for g in groups)]
        fractions = [r["copy_fraction"] for r in mine if r["copy_fraction"] is not None]
        line.append(f"{100 * geometric_mean(fractions):.0f}" if fractions else "-")
        lines.append([*line, str(len(mine))])
    return aligned(lines, left=1)


def _legend(rows: Sequence[Row], notes: dict[str, str]) -> list[str]:
    lines = []
    if any(r["noisy"] for r in rows):
        lines.append("~  the two halves of the samples differ by more than the claimed difference")
    if any(r["launch_gaps"] for r in rows):
        gaps = {case_key(r) for r in rows if r["launch_gaps"]}
        lines.append(f"in {len(gaps)} cases the host was too slow: gaps between launches are timed")
    if any(r.get("graph_us") for r in rows):
        lines.append("graph us: a call's share of a CUDA graph of many, warm whatever cache says")
    lines += [f"{mark} {text}" for text, mark in notes.items()]
    shown = columns(rows)
    absent: dict[str, str] = {}
    for row in rows:
        if row["provider"] not in shown and row["reason"]:
            absent.setdefault(row["provider"], row["reason"])
    return lines + [f"unavailable: {name}: {reason}" for name, reason in absent.items()]


#: Suffixes of the files that plots can be written to.
PICTURES = ("png", "svg", "pdf", "jpg", "jpeg", "webp")


def check_picture(path: Path, option: str) -> None:
    """Raises ValueError if no plot can be written to this file."""
    if path.suffix.lower().removeprefix(".") not in PICTURES:
        raise ValueError(f"{option} {path}: the name must end in .{', .'.join(PICTURES)}")
    check_output(path, option)


def threads_of(header: dict[str, Any]) -> str:
    return f"{header['threads']} thread{'s' if header['threads'] > 1 else ''}"


def source_of(header: dict[str, Any]) -> str:
    """The commit of bnorm_ext that was measured, or that it was an installed package."""
    return f"commit {header['commit']}" if header.get("commit") else "as installed"


def title(header: dict[str, Any]) -> str:
    """Machine, versions, date and command, for the head of a table."""
    v = header["versions"]
    threads = f", {threads_of(header)}" if header["device"] == "cpu" else ""
    text = (
        f"{header['device_name']}{threads}; torch {v['torch']}, bnorm_ext {v['bnorm_ext']}, "
        f"{source_of(header)}, {header['date'][:10]}; {header['command']}"
    )
    return textwrap.fill(text, 110, break_on_hyphens=False)


def write_json(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{"header": {json.dumps(header, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    write(path, text.encode())


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a result of the microbenchmarks. Raises ValueError, with one line, if the
    file is none."""
    try:
        content = json.loads(path.read_text())
        header, rows = content["header"], content["rows"]
        fits = isinstance(header.get("versions", {}), dict) and isinstance(rows, list)
        fits = fits and all(map(_is_row, rows))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: not a file that --json wrote, or not one of the microbenchmarks")
    return header, rows


def _is_row(row: Row) -> bool:
    """Whether a row has all that comparisons and plots need."""
    texts = ("device", "cache", "layout", "op", "pass", "provider", "layer")
    times = [row[name] for name in ("median_us", "p10_us", "p90_us", "first_half_us",
                                    "second_half_us")]  # fmt: skip
    numbers = [row[name] for name in ("ratio", "copy_fraction")] + times
    return (
        all(isinstance(row[name], str) for name in texts)
        and row["dtype"] in SHORT
        and all(isinstance(size, int) and size > 0 for size in row["shape"])
        and len(row["shape"]) > 1
        and isinstance(row["count"], int)
        and all(n is None or 0 < n < math.inf for n in numbers)
        and len({n is None for n in times}) == 1  # timed or not
        and row["correct"] in (None, True, False)
        and "reason" in row
    )


class Progress:
    """Progress on stderr: on a terminal a bar (if tqdm is installed), else a line for each step."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.done = total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=what, unit="case", dynamic_ncols=True)

    def step(self, text: str) -> None:
        self.done += 1
        if self._bar is None:
            width = len(str(self.total))
            print(f"[{self.done:{width}}/{self.total}] {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def one_line(case: object, rows: Sequence[Row]) -> str:
    """A case and its times as one line of progress."""
    times = [
        f"{r['provider']} {number(r['median_us'])}" for r in rows if r["median_us"] is not None
    ]
    return f"{case}: {', '.join(times)} us"
