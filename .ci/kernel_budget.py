"""Whether the kernels' main loops stay within what they may take: instructions an element, FP64.

A part of .ci/check_kernels.py, which has compiled the kernels. kernel_budget.json has, for each
architecture and each instance of a kernel ("kernel dtype width mapping"), the instructions for an
element of x in its loops. To write it anew, after a change that is worth what it costs:

    python .ci/check_kernels.py --update-budget
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bnorm_ext.bench.static.instances import counts_in  # noqa: E402
from bnorm_ext.bench.static.kernels import KERNELS, Counts  # noqa: E402
from bnorm_ext.bench.static.sass import parse  # noqa: E402

FILE = ROOT / ".ci" / "kernel_budget.json"
#: Another release of nvcc may take a few instructions more.
SLACK = 1.03
#: FP64 operations an element that main loops of 16- and 32-bit data may have, by kernel, with the
#: reason. There are none: sums are in float32, and become double once for each run of 64 vectors.
FP64_ALLOWED: dict[str, float] = {}

Budget = dict[str, dict[str, float]]


def name_of(c: Counts) -> str:
    return f"{c.kernel.name} {c.dtype} {c.width} {c.mapping}"


def counted(file: str, listing: str) -> list[Counts]:
    """The instances in what cuobjdump prints of a source file, where these are kernels whose loops
    are counted."""
    kernels = [kernel for kernel in KERNELS if kernel.file == file]
    functions = parse(listing) if kernels else []
    return [c for kernel in kernels for c in counts_in(functions, kernel)]


def budget_of(counts: Sequence[Counts]) -> Budget:
    found: Budget = {}
    for c in counts:
        found.setdefault(f"sm_{c.arch}", {})[name_of(c)] = round(c.per_element(), 2)
    return {arch: dict(sorted(found[arch].items())) for arch in sorted(found)}


def read() -> Budget:
    budget: Budget = json.loads(FILE.read_text())
    return budget


def write(budget: Budget) -> None:
    """Architectures that were not compiled stay as they are."""
    FILE.write_text(json.dumps({**read(), **budget} if FILE.exists() else budget, indent=1) + "\n")


def beyond(counts: Sequence[Counts], budget: Budget) -> list[str]:
    """A line for each instance that takes more than it may, for each that the budget lacks, and for
    each of the budget that there is not. Architectures without a budget have none."""
    lines = []
    for arch, taken in budget_of(counts).items():
        may = budget.get(arch)
        if may is None:
            continue
        for name in sorted({*may, *taken}):
            if name not in may:
                lines.append(f"{arch} {name}: not in the budget")
            elif name not in taken:
                lines.append(f"{arch} {name}: in the budget, but not compiled")
            elif taken[name] > may[name] * SLACK:
                lines.append(
                    f"{arch} {name}: {taken[name]} instructions an element, at most {may[name]}"
                )
    for c in counts:
        fp64 = c.per_element("fp64") + c.per_element("conversions64")
        if c.dtype != "float64" and fp64 > FP64_ALLOWED.get(c.kernel.name, 0):
            lines.append(f"sm_{c.arch} {name_of(c)}: {fp64:.2f} FP64 operations an element")
    return lines
