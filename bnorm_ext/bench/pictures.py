"""Plots of results, 1200 pixels wide."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files and needs no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image  # installed with matplotlib

from .cases import DTYPES
from .options import write
from .providers import BASELINE
from .report import SHORT, geometric_mean, source_of, threads_of
from .run import COPY, Row

# The colours of Okabe and Ito, which colour-blind people can tell apart. Markers and lines differ
# too, for print.
STYLES = {
    "bnorm_ext": ("#0072B2", "o", "-"),
    "bnorm_ext-unfused": ("#0072B2", "o", "--"),
    "torch": ("#E69F00", "s", "-"),
    "torch-nocudnn": ("#56B4E9", "v", "--"),
    "torch.compile": ("#009E73", "^", "--"),
    "apex": ("#CC79A7", "D", ":"),
    "inplace_abn": ("#D55E00", "P", ":"),
    "timm": ("#000000", "X", ":"),
    "attorch": ("#999999", "*", ":"),
    "flag_gems": ("#F0E442", "p", ":"),
}
GREY = "#555555"
PASS_NAMES = {
    "fwd": "forward", "bwd": "backward", "eval": "inference", "fwd+bwd": "forward + backward"
}  # fmt: skip
FONT: Any = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(header: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Plots the speed-up by layer for a net, else the fraction of copy bandwidth against size."""
    with plt.rc_context(FONT):
        if any(r["layer"] for r in rows):
            figure = speed_up_by_layer(header, rows)
        else:
            figure = roofline(header, rows)
        drawn = io.BytesIO()
        form = path.suffix.lower().removeprefix(".")
        figure.savefig(drawn, dpi=100, format=form)
        plt.close(figure)
    if form == "png":
        # 64 colours are enough and need a quarter of the bytes, which matters for files in git.
        image = Image.open(drawn).convert("RGB").quantize(64)
        drawn = io.BytesIO()
        image.save(drawn, format="png", optimize=True)
    write(path, drawn.getvalue())


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["correct"] and r["median_us"] is not None]


def _providers(rows: Sequence[Row]) -> list[str]:
    return [p for p in STYLES if any(r["provider"] == p for r in rows)]


def _variants(rows: Sequence[Row], fields: Sequence[str]) -> str:
    """The values of these fields that are the same in all rows, for the title."""
    common = []
    for field in fields:
        values = list(dict.fromkeys(r[field] for r in rows))
        if len(values) == 1:
            common.append(SHORT.get(values[0], values[0]))
    return ", ".join(common)


def _figure(
    header: dict[str, Any], rows: Sequence[Row], columns: int, lines: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with its panels, line by line, and machine and date below them."""
    size = (12, 6.2)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    threads = f", {threads_of(header)}" if header["device"] == "cpu" else ""
    versions = header["versions"]
    text = (
        f"{header['device_name']}{threads}, torch {versions['torch']}, bnorm_ext "
        f"{versions['bnorm_ext']} ({source_of(header)}), {header['date'][:10]}. Medians, "
        f"{_variants(rows, ('cache',)) or 'cold and warm'} caches. {header['command']}"
    )
    wrapped = textwrap.fill(text, 150, break_on_hyphens=False)
    figure.text(0.01, 0.012, wrapped, fontsize=10, color=GREY, va="bottom", linespacing=1.3)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.84, bottom=0.2, wspace=0.06)
    return figure, list(axes.flat)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="upper right", bbox_to_anchor=(0.99, 0.945),
        ncols=min(len(entries), 5), frameon=False, fontsize=12, handlelength=2.2,
    )  # fmt: skip


def speed_up_by_layer(header: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Time of the baseline / time of a provider, for each shape in the order of the net."""
    timed = [r for r in _timed(rows) if r["ratio"] is not None]
    passes = list(dict.fromkeys(r["pass"] for r in timed)) or ["fwd"]
    variants = list(dict.fromkeys(_variant(r) for r in timed))
    figure, axes = _figure(header, rows, len(passes))
    shown = [p for p in _providers(timed) if p != BASELINE]
    order = list(dict.fromkeys(tuple(r["shape"]) for r in timed))
    for axis, pass_ in zip(axes, passes, strict=True):
        axis.axhline(1, color=STYLES[BASELINE][0], linewidth=2, label=BASELINE)
        for provider in shown:
            color, marker, _ = STYLES[provider]
            for variant, dash in zip(
                variants, ("-", "--", ":", "-.") * len(variants), strict=False
            ):
                mine = [r for r in timed if r["provider"] == provider and r["pass"] == pass_]
                mine = [r for r in mine if _variant(r) == variant]
                if not mine:
                    continue
                label = provider if len(variants) == 1 else f"{provider} {variant}"
                x = [order.index(tuple(r["shape"])) for r in mine]
                axis.plot(x, [r["ratio"] for r in mine], marker=marker, linestyle=dash,
                          color=color, linewidth=1.4, markersize=7, label=label)  # fmt: skip
        ours = (
            [r for r in timed if r["provider"] == shown[0] and r["pass"] == pass_] if shown else []
        )
        total = _net_ratio(timed, ours)
        title = PASS_NAMES[pass_]
        if ours:
            mean = geometric_mean(r["ratio"] for r in ours)
            title += (
                f": {shown[0]} {total:.2f} times as fast over the net,\ngeometric mean {mean:.2f}"
            )
        axis.set_title(title, loc="left", fontsize=12)
        _layer_axis(axis, order, {tuple(r["shape"]): r["count"] for r in timed})
        _log_axis(axis, [r["ratio"] for r in timed])
    axes[0].set_ylabel(f"times as fast as {BASELINE}")
    figure.subplots_adjust(bottom=0.27, top=0.82)
    net, common = header.get("suite"), _variants(timed, ("dtype", "layout", "op"))
    figure.suptitle(f"Batch norms of {net}, N = {order[0][0] if order else '?'}: {common}",
                    x=0.01, ha="left", fontsize=16)  # fmt: skip
    _legend(figure, axes)
    return figure


def _variant(row: Row) -> str:
    return f"{SHORT[row['dtype']]} {row['layout']} {row['op']} {row['cache']}"


def _net_ratio(timed: Sequence[Row], ours: Sequence[Row]) -> float:
    """The ratio of the times of all layers of the net, each shape weighted by its count."""
    mine = sum(r["median_us"] * r["count"] for r in ours)
    base = sum(r["median_us"] * r["ratio"] * r["count"] for r in ours)
    return base / mine if mine else math.nan


def _layer_axis(
    axis: Axes, order: Sequence[tuple[int, ...]], counts: dict[tuple[int, ...], int]
) -> None:
    every = math.ceil(len(order) / 24)  # more labels than that cannot be read
    places = range(0, len(order), every)
    names = [f"{order[i][1]}@{order[i][-1]}" for i in places]
    if every == 1:
        names = [
            f"{name} x{counts[order[i]]}" for name, i in zip(names, places, strict=True)
        ]  # fmt: skip
    axis.set_xticks(
        list(places), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=10
    )
    axis.set_xlabel("channels@width" + (" x how often" if every == 1 else ""), fontsize=11)
    axis.grid(axis="both", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)


def _log_axis(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis for ratios: factors 2 and 1/2 are equally far from 1."""
    axis.set_yscale("log")
    low, high = min([*values, 1]), max([*values, 1])
    axis.set_ylim(low / 1.15, high * 1.15)
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
    axis.set_yticks([t for t in ticks if low / 1.15 <= t <= high * 1.15])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()


def roofline(header: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """GB/s relative to the copy in the same rounds, against the bytes of one tensor. A column of
    panels for each pass, a line for each state of the caches."""
    timed = [r for r in _timed(rows) if r["copy_fraction"] is not None]
    passes = list(dict.fromkeys(r["pass"] for r in timed)) or ["fwd"]
    caches = list(dict.fromkeys(r["cache"] for r in timed)) or ["cold"]
    figure, axes = _figure(header, rows, len(passes), len(caches))
    if len(caches) > 1:
        figure.subplots_adjust(hspace=0.36)
    sweep = str(header.get("suite") or "").startswith("sweep")
    panels = [(cache, pass_) for cache in caches for pass_ in passes]
    for axis, (cache, pass_) in zip(axes, panels, strict=True):
        axis.axhline(100, color=GREY, linewidth=1.5, linestyle="--", label=COPY)
        shown = [r for r in timed if (r["cache"], r["pass"]) == (cache, pass_)]
        for provider in _providers(shown):
            mine = [r for r in shown if r["provider"] == provider]
            for i, variant in enumerate(dict.fromkeys(_variant(r) for r in mine)):
                color, marker, line = STYLES[provider]
                same = [r for r in mine if _variant(r) == variant]
                points = sorted((_megabytes(r), 100 * r["copy_fraction"]) for r in same)
                axis.plot(*zip(*points, strict=True), marker=marker, color=color,
                          linestyle=line if sweep else "none", linewidth=1.6, markersize=7,
                          markerfacecolor="white" if _is_16_bit(variant) else color,
                          label=None if i else provider)  # fmt: skip
        cached = f", {cache} caches" if len(caches) > 1 else ""
        axis.set_title(PASS_NAMES[pass_] + cached, loc="left", fontsize=13)
        _size_axis(axis, [_megabytes(r) for r in timed])
        axis.set_ylim(0, 1.08 * max([100, *(100 * r["copy_fraction"] for r in timed)]))
    for axis in axes[-len(passes) :]:
        axis.set_xlabel("one tensor, MB (log scale)")
    figure.supylabel("% of copy bandwidth, from bytes at the floor", x=0.008, fontsize=13)
    common = _variants(timed, ("dtype", "layout", "op"))
    if len({_is_16_bit(SHORT[r["dtype"]]) for r in timed}) > 1:
        common += "; hollow: 16 bits" if common else "hollow: 16 bits"
    name = header.get("suite") or "given shapes"
    figure.suptitle(f"How near to a copy: {name}{', ' if common else ''}{common}",
                    x=0.01, ha="left", fontsize=16)  # fmt: skip
    _legend(figure, axes)
    return figure


def _size_axis(axis: Axes, sizes: Sequence[float]) -> None:
    axis.set_xscale("log")
    low, high = min(sizes, default=1) / 1.5, max(sizes, default=1) * 1.5
    axis.set_xlim(low, high)
    powers = [m * 10.0**e for e in range(-5, 5) for m in (1, 3)]
    axis.set_xticks([t for t in powers if low <= t <= high])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.grid(color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)


def _is_16_bit(variant: str) -> bool:
    return variant.startswith(("fp16", "bf16"))


def _megabytes(row: Row) -> float:
    return math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize / 1e6
