"""The demo's table, what to read in it, and its plot. Every number is computed from the runs."""

from __future__ import annotations

import math
import platform
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # a file is written; no display is needed

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import bnorm_ext

if TYPE_CHECKING:
    from digits import Run

Found = Sequence[Sequence["Run"]]  # by seed; in each the variants in the same order, torch's first
# Okabe and Ito, told apart by the colour-blind; markers and lines differ too, for print.
STYLES = (("#E69F00", "s", "-"), ("#56B4E9", "o", "--"), ("#0072B2", "^", ":"))
GREY = "#555555"


def by_variant(found: Found, value: Callable[[Run, Run], float]) -> list[list[float]]:
    """For each variant its values by seed, of the run and of torch's run with the same seed."""
    return [[value(runs[i], runs[0]) for runs in found] for i in range(len(found[0]))]


def ratios(found: Found) -> list[list[float]]:
    return by_variant(found, lambda run, native: native.step_time / run.step_time)


def gains(found: Found) -> list[list[float]]:
    """Test accuracy less that of torch's run with the same seed, in percentage points."""
    return by_variant(found, lambda run, native: 100 * (run.accuracy - native.accuracy))


def spread(values: Sequence[float], form: str, middle: float | None = None) -> str:
    """Median, or what is given in its place, with the smallest and the largest behind it."""
    middle = statistics.median(values) if middle is None else middle
    if len(values) == 1:
        return f"{middle:{form}}"
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def table(found: Found) -> str:
    times = by_variant(found, lambda run, _: 1e3 * run.step_time)
    accuracies = by_variant(found, lambda run, _: 100 * run.accuracy)
    lines = [["batch norm", "ms a step", "times as fast", "test accuracy, %", "minus torch.nn's"]]
    for i, run in enumerate(found[0]):
        lines.append(
            [
                run.name,
                spread(times[i], ".2f"),
                spread(ratios(found)[i], ".2f") if i else "",
                spread(accuracies[i], ".2f", statistics.mean(accuracies[i])),
                spread(gains(found)[i], "+.2f", statistics.mean(gains(found)[i])) if i else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def reading(found: Found, device: torch.device) -> str:
    """How to read the table, and what it shows of time and of accuracy."""
    if len(found) == 1:
        first = "How to read it: one seed says nothing about chance, --seeds 5 does."
    else:
        first = (
            f"How to read it: over {len(found)} seeds, time and ratio as median, accuracy as mean; "
            "in brackets the smallest and the largest."
        )
    lines = [first]
    for i, run in enumerate(found[0][1:], 1):
        lines.append(f"{run.name}: {_speed(ratios(found)[i])}; {_accuracy(gains(found)[i])}.")
    native = [100 * runs[0].accuracy for runs in found]
    if len(found) > 1:
        moved = max(native) - min(native)
        lines.append(f"From seed to seed, torch.nn's own accuracy moves by {moved:.2f} points.")
    apart = max(abs(run.losses[0] - runs[0].losses[0]) for runs in found for run in runs)
    lines += [
        f"The losses of the first step differ by {apart:.0e} at most: the same function, rounded "
        "differently. Training amplifies that.",
        f"{device_name(device)}, torch {torch.__version__}, bnorm_ext {bnorm_ext.__version__} "
        f"({kernel_path(device)})",
    ]
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)


def _speed(values: Sequence[float]) -> str:
    faster = sum(value > 1 for value in values)
    if 0 < faster < len(values):
        return f"faster with {faster} of {len(values)} seeds: no clear difference"
    return f"{'faster' if faster else 'slower'}{' with every seed' * (len(values) > 1)}"


def _accuracy(values: Sequence[float]) -> str:
    higher, lower = (sum(sign * value > 0 for value in values) for sign in (1, -1))
    if not higher and not lower:
        return "accuracy equal with every seed"
    text = f"accuracy higher with {higher}, lower with {lower}, equal with "
    text += f"{len(values) - higher - lower}"
    # A sign test: as often as coins in that number come down so unevenly, to either side.
    tosses = higher + lower
    uneven = sum(math.comb(tosses, k) for k in range(min(higher, lower) + 1))
    return text + f", as unevenly by chance in {min(1.0, 2 * uneven / 2**tosses):.0%} of all cases"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def kernel_path(device: torch.device) -> str:
    """Which of the extension's kernels serve this device."""
    info = bnorm_ext.build_info()
    if device.type == "cpu" and info["cpu_capability"]:
        return f"kernels: cpu, {info['cpu_capability']}"
    if device.type == "cuda" and info["cuda_kernels"]:
        return f"kernels: cuda, {' '.join(info['archs'])}"
    return "no kernels of its own: torch's operators"


# --- the plot -------------------------------------------------------------------------------------


def plot(found: Found, device: torch.device, output: Path) -> None:
    """Time of a step, losses, and accuracies, each seed by itself where it can be told."""
    names = [run.name for run in found[0]]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    figure.suptitle("Handwritten digits, one small MobileNetV2, three batch norms", fontsize=15)
    times = by_variant(found, lambda run, _: 1e3 * run.step_time)
    _dots(left, names, times, statistics.median)
    for i, values in enumerate(ratios(found)[1:], 1):
        label = f"{statistics.median(values):.2f} times\nas fast"
        left.annotate(label, (i, min(times[i])), (0, -14), textcoords="offset points",
                      ha="center", va="top", fontsize=10)  # fmt: skip
    left.set_ylim(0, 1.08 * max(map(max, times)))
    left.set_title(f"Time of a step ({counted(len(found), 'seed')}; bar: median)", fontsize=11)
    left.set_ylabel("milliseconds, lower is better")
    _losses(middle, found)
    accuracies = by_variant(found, lambda run, _: 100 * run.accuracy)
    for runs in zip(*accuracies, strict=True):
        right.plot(range(len(names)), runs, color=GREY, linewidth=0.8, alpha=0.5, zorder=1)
    _dots(right, names, accuracies, statistics.mean)
    right.set_title("Test accuracy (line: one seed; bar: mean)", fontsize=11)
    right.set_ylabel("% of test images")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    versions = f"torch {torch.__version__}, bnorm_ext {bnorm_ext.__version__}"
    figure.supxlabel(f"{device_name(device)}, {versions}", fontsize=9, color=GREY)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _dots(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    middle: Callable[[Sequence[float]], float],
) -> None:
    """A dot for each seed, and a bar in the middle."""
    for i, (mine, (color, marker, _)) in enumerate(zip(values, STYLES, strict=True)):
        axes.plot([i] * len(mine), mine, marker, color=color, markersize=8, markeredgecolor="white")
        axes.hlines(middle(mine), i - 0.25, i + 0.25, color=color, linewidth=3)
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)


def _losses(axes: Axes, found: Found) -> None:
    """The mean over the seeds for each variant, and how far torch's runs reach."""
    losses = np.array([[run.losses for run in runs] for runs in found])  # seed, variant, step
    steps = np.arange(1, losses.shape[2] + 1)
    native = losses[:, 0]
    if len(found) > 1:
        axes.fill_between(steps, native.min(0), native.max(0), color=GREY, alpha=0.2, linewidth=0,
                          label="torch.nn, all seeds")  # fmt: skip
    for i, run in enumerate(found[0]):
        color, _, line = STYLES[i]
        width = (4, 2.2, 1.6)[i]  # one on the other: all can be seen
        axes.plot(steps, losses[:, i].mean(0), line, color=color, linewidth=width, label=run.name)
    axes.set_yscale("log")
    axes.set_title(f"Training loss (mean of {counted(len(found), 'seed')})", fontsize=11)
    axes.set_xlabel("optimisation step")
    axes.set_ylabel("cross entropy (log scale)")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def plot_distributed(
    losses: Mapping[str, Sequence[float]],
    world: int,
    each: int,
    device: torch.device,
    output: Path,
) -> None:
    """The curves of the trainings, and how far each is from the first. `each`: images of one
    process in a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    title = f"Handwritten digits on {world} processes, {counted(each, 'image')} each a step"
    figure.suptitle(title, fontsize=15)
    alone = np.array(next(iter(losses.values())))
    steps = np.arange(1, len(alone) + 1)
    window = max(1, len(alone) // 30)
    # One on the other: all can be seen.
    styles = zip(losses.items(), STYLES, (5, 2.2, 1.6), (0.6, 1, 1), strict=True)
    for (name, values), (color, _, line), width, alpha in styles:
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, line, color=color, linewidth=width, label=name,
                  alpha=alpha)  # fmt: skip
        if values is not losses[next(iter(losses))]:
            # A difference of 0 has no place on a log scale.
            apart = np.maximum(np.abs(np.array(values) - alone), 1e-18)
            right.plot(steps, apart, line, color=color, linewidth=1.4, label=name)
    left.set_title(f"Training loss (mean of {counted(window, 'step')})", fontsize=11)
    left.set_ylabel("cross entropy (log scale)")
    right.set_title("Distance of the loss from that of one process", fontsize=11)
    right.set_ylabel("absolute difference (log scale)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("optimisation step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    versions = f"torch {torch.__version__}, bnorm_ext {bnorm_ext.__version__}"
    figure.supxlabel(f"{device_name(device)}, {versions}", fontsize=9, color=GREY)
    figure.savefig(output, dpi=130)
    plt.close(figure)
