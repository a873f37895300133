"""Trains a small ResNet on scikit-learn's handwritten digits twice: with torch's batch norm, and
after ``bnorm_ext.convert_batchnorm(model)``.

Both runs start from the same weights and see the same batches. They advance step by step in turn,
so that whatever else the machine does slows both alike; neither run's numbers depend on that. At
the end stand a table (time, accuracy, how far the losses are apart) and a plot of the losses.

Usage: ``python demo/digits.py [--epochs N] [--output FILE.png] [--seed N] [--device cpu|cuda]``
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written; no display is needed

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bnorm_ext

BATCH_SIZE = 64
TEST_SIZE = 360
LEARNING_RATE = 0.05
# Losses are compared over the first steps. Sooner or later a rounding difference flips one ReLU and
# is amplified from there on, as it is between two native runs that round differently.
COMPARED_STEPS = 10
WARM_UP_STEPS = 5  # left out of the timing: allocator and thread pool start up
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"  # Okabe and Ito, safe for the colour-blind


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitNet(nn.Module):
    """ResNet for ``(N, 1, 8, 8)`` images: three stages of one block, 8 batch norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)
        )
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


@dataclass
class Run:
    """One of the two trainings."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = float("nan")

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimisation step, timed from the images to the updated weights."""
        synchronize(images.device)
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    @property
    def step_time(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        self.accuracy = (self.model(images).argmax(1) == labels).float().mean().item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digits(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)`` in [-1, 1] and labels, split at random: train, then test."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32))[:, None] / 8 - 1
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].to(device), labels[order].to(device)
    return images[TEST_SIZE:], labels[TEST_SIZE:], images[:TEST_SIZE], labels[:TEST_SIZE]


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of each batch; every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % BATCH_SIZE].split(BATCH_SIZE)


def train(epochs: int, seed: int, device: torch.device, *, progress: bool = True) -> list[Run]:
    """Both trainings, native first in the list."""
    torch.manual_seed(seed)
    native = DigitNet().to(device)
    converted = bnorm_ext.convert_batchnorm(copy.deepcopy(native))
    images, labels, test_images, test_labels = digits(seed, device)
    steps = epochs * (len(labels) // BATCH_SIZE)
    runs = []
    for name, model in (("torch.nn", native), ("bnorm_ext", converted)):
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        # Up during the first fifth, then down: the usual for ResNets.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2, cycle_momentum=False
        )
        runs.append(Run(name, model, optimizer, schedule))
    bar = tqdm(total=steps, desc="training both", unit="step", disable=not progress)
    with bar:
        for index, batch in enumerate(batches(len(labels), epochs, seed)):
            batch = batch.to(device)
            # Taking turns in going first: whoever is second finds the images in the cache.
            for run in runs if index % 2 == 0 else reversed(runs):
                run.step(images[batch], labels[batch])
            bar.update()
            losses = ", ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs)
            bar.set_postfix_str(f"loss {losses}", refresh=False)
    for run in runs:
        run.evaluate(test_images, test_labels)
    return runs


def largest_difference(runs: Sequence[Run]) -> float:
    """Of the two losses, over the first steps."""
    native, ours = runs
    pairs = zip(native.losses[:COMPARED_STEPS], ours.losses[:COMPARED_STEPS], strict=True)
    return max(abs(a - b) for a, b in pairs)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def kernel_path(device: torch.device) -> str:
    """Which of the extension's kernels serve this device."""
    info = bnorm_ext.build_info()
    if device.type == "cpu" and info["cpu_capability"]:
        return f"cpu, {info['cpu_capability']}"
    if device.type == "cuda" and info["cuda_kernels"]:
        return f"cuda, {' '.join(info['archs'])}"
    return "none: torch's own operators"


def table(runs: Sequence[Run], device: torch.device) -> str:
    native, ours = runs
    ratio = native.step_time / ours.step_time
    steps = min(COMPARED_STEPS, len(native.losses))
    rows = [
        ("", native.name, ours.name),
        ("device", device_name(device), ""),
        ("kernel path", "torch", kernel_path(device)),
        (
            "step time (median)",
            f"{native.step_time * 1e3:.2f} ms",
            f"{ours.step_time * 1e3:.2f} ms",
        ),
        ("step time, torch.nn / bnorm_ext", "", f"{ratio:.2f}"),
        (f"test accuracy ({TEST_SIZE} images)", f"{native.accuracy:.2%}", f"{ours.accuracy:.2%}"),
        (f"largest loss difference, {steps} steps", "", f"{largest_difference(runs):.1e}"),
    ]
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows[2:] + rows[:1])
    lines = [f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def plot(runs: Sequence[Run], output: Path) -> None:
    """Both losses over the steps, and below them how far apart they are."""
    native, ours = runs
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    steps = np.arange(1, len(native.losses) + 1)
    label = "{} ({:.1%} test accuracy)"
    top.plot(
        steps,
        native.losses,
        color=ORANGE,
        linewidth=4,
        label=label.format("torch.nn.BatchNorm2d", native.accuracy),
    )
    top.plot(
        steps,
        ours.losses,
        color=BLUE,
        linewidth=1.3,
        label=label.format("bnorm_ext.BatchNorm2d", ours.accuracy),
    )
    top.set_yscale("log")
    top.set_ylabel("training loss (log scale)")
    top.set_title("Handwritten digits, one net, two batch norms: same seed, same batches")
    top.legend(frameon=False)
    difference = np.abs(np.subtract(native.losses, ours.losses))
    bottom.plot(steps, np.where(difference > 0, difference, np.nan), ".", color=GREY, markersize=3)
    bottom.set_yscale("log")
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("optimisation step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("build/demo/digits.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if any")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = train(options.epochs, options.seed, device)
    plot(runs, options.output)
    print(f"\n{table(runs, device)}\n\nloss curves: {options.output.resolve()}")
    return runs


if __name__ == "__main__":
    main()
