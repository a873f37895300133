"""Comparing two results of the microbenchmarks, and telling changes from noise:
`python -m bench.compare OLD.json NEW.json`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Parser
from .report import SHORT, aligned, case_key, geometric_mean, number, read_json
from .run import COPY, Row

LEAST = 0.02  # relative; smaller changes are never called real


@dataclass(frozen=True)
class Change:
    """The same measurement in two files."""

    old: Row
    new: Row

    @property
    def factor(self) -> float:
        """Old time / new time: above 1 the new one is faster."""
        return float(self.old["median_us"] / self.new["median_us"])

    @property
    def noise(self) -> float:
        """Microseconds: the largest, over both files, of half the spread (p10 to p90) and of the
        drift between the halves of a run."""
        found = (
            max((r["p90_us"] - r["p10_us"]) / 2, abs(r["first_half_us"] - r["second_half_us"]))
            for r in (self.old, self.new)
        )
        return float(max(found))

    @property
    def real(self) -> bool:
        difference: float = abs(self.old["median_us"] - self.new["median_us"])
        return difference > self.noise and abs(math.log(self.factor)) > math.log1p(LEAST)


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The measurements that were timed in both, in the order of the new file."""
    before = {(case_key(r), r["provider"]): r for r in old if r["median_us"] is not None}
    found = []
    for row in new:
        known = before.get((case_key(row), row["provider"]))
        if known and row["median_us"] is not None:
            found.append(Change(known, row))
    return found


def _status(row: Row) -> str:
    if row["correct"] is None and row["median_us"] is None:
        return "unavailable"
    return "right" if row["correct"] in (True, None) else "wrong"


def _machines(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = [
        f"old: {old.get('date')}, commit {old.get('commit')}, {old.get('device_name')}",
        f"new: {new.get('date')}, commit {new.get('commit')}, {new.get('device_name')}",
    ]
    for name in ("device_name", "threads", "method"):
        if old.get(name) != new.get(name):
            lines.append(f"The two differ in {name}: times are hardly comparable.")
    versions = (old.get("versions", {}), new.get("versions", {}))
    for name in dict.fromkeys([*versions[0], *versions[1]]):
        a, b = (v.get(name) for v in versions)
        if a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def report(
    old: tuple[dict[str, Any], Sequence[Row]], new: tuple[dict[str, Any], Sequence[Row]]
) -> str:
    """The table of changes, their geometric means, and which measurements are in one file only."""
    text = _machines(old[0], new[0])
    found = changes(old[1], new[1])
    lines = [["case", "provider", "old, us", "new, us", "old / new", "noise", ""]]
    for c in found:
        r = c.new
        shape = "x".join(map(str, r["shape"]))
        case = f"{shape} {SHORT[r['dtype']]} {r['layout']} {r['op']} {r['pass']} {r['cache']}"
        verdict = ("faster" if c.factor > 1 else "SLOWER") if c.real else ""
        if _status(c.old) != _status(r):
            verdict += f" was {_status(c.old)}, is {_status(r)}"
        times = [number(c.old["median_us"]), number(r["median_us"]), f"{c.factor:.2f}"]
        noise = f"{100 * c.noise / c.old['median_us']:.0f} %"
        lines.append([case, r["provider"], *times, noise, verdict.strip()])
    text += ["", *(aligned(lines, left=2) if found else ["No case was timed in both."]), ""]
    for provider in dict.fromkeys(c.new["provider"] for c in found):
        mine = [c for c in found if c.new["provider"] == provider]
        mean = geometric_mean(c.factor for c in mine)
        faster = sum(c.real and c.factor > 1 for c in mine)
        slower = sum(c.real and c.factor < 1 for c in mine)
        text.append(
            f"{provider}: geometric mean {mean:.2f} over {len(mine)} cases; beyond the noise "
            f"{faster} faster, {slower} slower"
            + (" (the machine itself, not the code)" if provider == COPY else "")
        )
    keys = [{(case_key(r), r["provider"]) for r in rows} for _, rows in (old, new)]
    for side, only in (("old", keys[0] - keys[1]), ("new", keys[1] - keys[0])):
        if only:
            text.append(f"{len(only)} rows are in the {side} file alone")
    now = {(case_key(r), r["provider"]): r for r in new[1]}
    for r in old[1]:
        other = now.get((case_key(r), r["provider"]))
        if other and r["median_us"] is not None and other["median_us"] is None:
            text.append(f"no longer measured: {r['provider']} {r['shape']}: {other['reason']}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = Parser(prog=command or f"python -m {__package__}.compare", description=__doc__)
    p.add_argument("old", type=Path, metavar="OLD.json")
    p.add_argument("new", type=Path, metavar="NEW.json")
    options = p.parse_args(arguments)
    try:
        files = [read_json(path) for path in (options.old, options.new)]
    except ValueError as error:
        p.error(str(error))
    print(report(*files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
