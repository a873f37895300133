"""The text of bench/results/predicted.md: shares of a copy that a model predicts, and how its H200
compares with a measured one."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from bnorm_ext._gpus import resolve_device

from .cases import DTYPES
from .cost_model import FORMATS, Prediction, mean_share, predict
from .machine import ROOT
from .nets import batch_norm_inputs

GPUS = ("H100", "H200", "B200", "A100", "L4", "RTX 4090")
NETS = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
BATCHES = (32, 64, 128, 256)
DTYPES_SHOWN = {"bfloat16": "bf16", "float32": "fp32"}
PASSES = {1: "fwd", 2: "bwd"}
MEASURED = ROOT / "bench" / "results" / "cuda-resnet50.json"

_HEAD = """# Predicted times on GPUs

**Predicted, not measured**: by the model that the planner chooses by (`csrc/cuda/cost.h`) and the
rates in data sheets. Written by `python -m bench.cost_model --table`. What has been measured is in
[performance.md](../../docs/performance.md#gpu).

Per cent of a copy: an empty launch and the fewest bytes at the rate of a copy, over the predicted
time; geometric means over the batch norms of the net in training. Forward / backward. In brackets:
the same in two passes, as torch's own kernels take, if these were as good as ours.
"""
_AGAINST = """
## The H200 column against a measured H200

ResNet-50, batch 64, over the twelve shapes of `cuda-resnet50.json`, each once, but for those whose
plan is another one now; whole calls with a flushed L2. *Share*: per cent of a copy as above, and as
measured. *Time*: measured over predicted, the geometric mean, the least and the greatest.

| dtype, layout, pass | share: predicted | measured | time: mean | least | greatest |
|---|---:|---:|---:|---:|---:|
"""


def table() -> str:
    lines = [_HEAD]
    for net, title in NETS.items():
        lines.append(f"## {title}\n")
        lines.append("| batch, dtype, layout | " + " | ".join(GPUS) + " |")
        lines.append("|---|" + "---:|" * len(GPUS))
        for batch in BATCHES:
            layers = Counter(shape for _, shape in batch_norm_inputs(net, batch))
            for dtype, short in DTYPES_SHOWN.items():
                for layout in FORMATS:
                    cells = [_cell(layers, dtype, layout, gpu) for gpu in GPUS]
                    lines.append(f"| {batch}, {short}, {layout} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" + _AGAINST + "\n".join(_against()) + "\n"


def _cell(layers: Counter[tuple[int, ...]], dtype: str, layout: str, gpu: str) -> str:
    parts = []
    for tensors in PASSES:
        found = {s: _predicted(s, dtype, layout, tensors, gpu) for s in layers}
        ours = mean_share([(one.floor, one.time, layers[s]) for s, one in found.items()])
        two = mean_share([(one.floor, one.two_passes, layers[s]) for s, one in found.items()])
        parts.append(f"{100 * ours:.0f} ({100 * two:.0f})")
    return " / ".join(parts)


def _predicted(
    shape: tuple[int, ...], dtype: str, layout: str, tensors: int, gpu: str
) -> Prediction:
    return predict(shape, DTYPES[dtype], layout, tensors, resolve_device(gpu))


def measured_layers() -> Iterator[tuple[tuple[str, str, str], tuple[int, ...], float, float]]:
    """(dtype, layout, pass), shape, us and share of a copy of an H200, by the plans of today."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text())["rows"]
    for row in rows:
        is_ours = row["provider"] == "bnorm_ext" and not row.get("replanned")
        if is_ours and row["pass"] in PASSES.values():
            case = row["dtype"], row["layout"], row["pass"]
            yield case, tuple(row["shape"]), row["median_us"], row["copy_fraction"]


def _against() -> Iterator[str]:
    tensors = {name: count for count, name in PASSES.items()}
    cases: dict[tuple[str, str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for case, shape, us, share in measured_layers():
        dtype, layout, name = case
        one = _predicted(shape, dtype, layout, tensors[name], "H200")
        cases[case].append((one.floor / one.time, share, us / one.time))
    for (dtype, layout, name), rows in sorted(cases.items()):
        predicted, measured, ratio = (
            math.exp(sum(math.log(row[k]) for row in rows) / len(rows)) for k in range(3)
        )
        ratios = [row[2] for row in rows]
        yield (
            f"| {dtype}, {layout}, {name} | {100 * predicted:.0f} | {100 * measured:.0f} | "
            f"{ratio:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
