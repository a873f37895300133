"""A training step in many processes: each variant in processes of its own, which alternate.

In one process, page faults, caches and the allocator's state depend on which variant ran before. A
process of its own for each variant has none of that; alternating them spreads over all variants
what else the machine does meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .machine import ROOT

Row = dict[str, Any]
#: What is summed up of each process: its median step, and what its profiled steps say.
FIGURES = ("median_us", "batch_norm_us", "batch_norm_share", "faults_per_step",
           "faults_per_profiled_step", "peak_bytes")  # fmt: skip


def rounds(variants: Sequence[str], arguments: Sequence[str], count: int) -> list[dict[str, Row]]:
    """Runs ``count`` rounds of one process for each variant. The order of the variants is reversed
    in every second round. Returns the row of each variant by round; an interruption ends the
    rounds."""
    found: list[dict[str, Row]] = []
    try:
        for number in range(count):
            found.append({})
            for variant in variants if number % 2 == 0 else list(reversed(variants)):
                found[-1][variant] = _one(variant, arguments)
                print(f"round {number + 1} of {count}: {variant}", file=sys.stderr)
    except KeyboardInterrupt:
        pass
    return found


def _one(variant: str, arguments: Sequence[str]) -> Row:
    """What ``bench.train`` measures of one variant in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"{__package__}.train", *arguments]
        done = subprocess.run(
            [*command, "--variant", variant, "--json", str(file)],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not file.exists():
            lines = done.stderr.strip().splitlines() or [
                f"the process ended with {done.returncode}"
            ]
            return {"variant": variant, "reason": lines[-1]}
        row: Row = json.loads(file.read_text())["rows"][0]
        return row


def summary(variants: Sequence[str], found: Sequence[dict[str, Row]]) -> list[Row]:
    """A row for each variant: medians over its processes, and the ratios of native's step to its
    step in the same round (median and quartiles). Batch norm's own time has no ratio where
    activations and additions are in it, which native's has apart."""
    rows = []
    for variant in variants:
        runs = [r[variant] for r in found if variant in r]
        good = [run for run in runs if run["reason"] is None]
        if not good:
            rows.append({"variant": variant, "reason": runs[0]["reason"] if runs else "not run"})
            continue
        row: Row = {"variant": variant, "processes": len(good), "reason": None}
        for name in FIGURES:
            values = [run[name] for run in good if run[name] is not None]
            row[name] = round(statistics.median(values), 4) if values else None
        row["quartiles_us"] = _quartiles([run["median_us"] for run in good])
        for name, ratio in (("median_us", "ratio"), ("batch_norm_us", "batch_norm_ratio")):
            pairs = [
                (r["native"][name], r[variant][name])
                for r in found
                if r.get("native", {}).get(name) and r.get(variant, {}).get(name)
            ]
            ratios = [native / mine for native, mine in pairs]
            if ratio == "batch_norm_ratio" and variant == "fused":
                ratios = []
            row[ratio] = round(statistics.median(ratios), 4) if ratios else None
            row[f"{ratio}_quartiles"] = _quartiles(ratios)
        rows.append(row)
    return rows


def _quartiles(values: Sequence[float]) -> list[float] | None:
    """The lower and the upper quartile."""
    if not values:
        return None
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and below them the reasons of variants that could not run."""
    lines = [["variant", "ms a step", "quartiles", "native / it", "quartiles", "batch norm, ms",
              "native / it", "quartiles", "faults a step", "profiled", "peak, MB",
              "processes"]]  # fmt: skip

    def shown(value: float | None, pattern: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value / scale, pattern)

    def both(values: Sequence[float] | None, pattern: str, scale: float = 1.0) -> str:
        return "-" if values is None else " to ".join(format(v / scale, pattern) for v in values)

    for r in rows:
        if r["reason"] is None:
            lines.append([
                r["variant"], shown(r["median_us"], ".1f", 1e3),
                both(r["quartiles_us"], ".1f", 1e3), shown(r["ratio"], ".3f"),
                both(r["ratio_quartiles"], ".2f"), shown(r["batch_norm_us"], ".1f", 1e3),
                shown(r["batch_norm_ratio"], ".2f"), both(r["batch_norm_ratio_quartiles"], ".2f"),
                shown(r["faults_per_step"], ",.0f"), shown(r["faults_per_profiled_step"], ",.0f"),
                shown(r["peak_bytes"], ",.0f", 1e6), str(r["processes"]),
            ])  # fmt: skip
    text = report.aligned(lines, left=1)
    return "\n".join([*text, *(f"{r['variant']}: {r['reason']}" for r in rows if r["reason"])])
