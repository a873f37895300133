"""Trains a small MobileNetV2 on scikit-learn's handwritten digits with three batch norms: torch's,
bnorm_ext's after ``convert_batchnorm``, and bnorm_ext's with the activation or the addition behind
it in the same call, after ``fuse_batchnorm_act``.

For each seed all three start from the same weights and see the same batches. They advance step by
step in turn, so that whatever else the machine does slows all alike; no variant's numbers depend on
the others. Several seeds show how much of a difference is chance.

Usage: ``python demo/digits.py``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from show import plot, reading, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bnorm_ext
from bnorm_ext.bench.options import DAY, Parser, device_of, positive, threads, whole
from bnorm_ext.bench.report import check_picture

BATCH_SIZE = 64
TEST_SIZE = 360
IMAGE_SIZE = 16
LEARNING_RATE = 0.05
WARM_UP_STEPS = 5  # left out of the timing: allocator and thread pool start up


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class Inverted(nn.Module):
    """MobileNetV2's block (arXiv:1801.04381): widen, filter each channel by itself, narrow. Little
    is multiplied, so that batch norm and activation are much of the time."""

    def __init__(self, c_in: int, c_out: int, stride: int, widen: int = 6) -> None:
        super().__init__()
        width = widen * c_in
        self.layers = nn.Sequential(
            *conv_norm(c_in, width, 1),
            nn.ReLU6(inplace=True),
            *conv_norm(width, width, 3, stride, groups=width),
            nn.ReLU6(inplace=True),
            *conv_norm(width, c_out, 1),
        )
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class DigitNet(nn.Module):
    """For ``(N, 1, 16, 16)`` images: 17 batch norms, 12 with a ReLU6 behind, 3 with an addition."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_norm(1, width, 3),
            nn.ReLU6(inplace=True),
            Inverted(width, width, 1),
            Inverted(width, 2 * width, 2),
            Inverted(2 * width, 2 * width, 1),
            Inverted(2 * width, 3 * width, 2),
            Inverted(3 * width, 3 * width, 1),
            *conv_norm(3 * width, 8 * width, 1),
            nn.ReLU6(inplace=True),
        )
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


@dataclass
class Run:
    """One training: of one variant, with one seed."""

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
    """Images ``(N, 1, 16, 16)`` in [-1, 1] and labels, split at random: train, then test."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32))[:, None] / 8 - 1
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear")
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


def variants(seed: int, device: torch.device) -> dict[str, nn.Module]:
    """The three models, with the same weights; torch's first."""
    torch.manual_seed(seed)
    native = DigitNet().to(device)
    fused, _ = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(native))
    return {
        "torch.nn": native,
        "bnorm_ext": bnorm_ext.convert_batchnorm(copy.deepcopy(native)),
        "bnorm_ext, fused": fused,
    }


def steps_of(epochs: int) -> int:
    return epochs * ((len(load_digits().target) - TEST_SIZE) // BATCH_SIZE)


def train(epochs: int, seed: int, device: torch.device, bar: tqdm | None = None) -> list[Run]:
    """One training of each variant."""
    images, labels, test_images, test_labels = digits(seed, device)
    runs = []
    for name, model in variants(seed, device).items():
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        # Up during the first fifth, then down.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            LEARNING_RATE,
            total_steps=steps_of(epochs),
            pct_start=0.2,
            cycle_momentum=False,
        )
        runs.append(Run(name, model, optimizer, schedule))
    # Whoever is second finds the images in the cache, and whoever follows a slow one finds less of
    # its own: every order comes equally often.
    orders = itertools.cycle(itertools.permutations(runs))
    for batch, order in zip(batches(len(labels), epochs, seed), orders, strict=False):
        batch = batch.to(device)
        for run in order:
            run.step(images[batch], labels[batch])
        if bar is not None:
            bar.update()
            bar.set_postfix_str(f"seed {seed}, loss {runs[0].losses[-1]:.4f}", refresh=False)
    for run in runs:
        run.evaluate(test_images, test_labels)
    return runs


def parser() -> Parser:
    p = Parser(
        description=__doc__.rpartition("\n\nUsage")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=whole(1, 1000), default=5, help="how many; default: 5")
    p.add_argument("--first-seed", type=whole(0, 1 << 32), default=0, help="default: 0")
    p.add_argument("--epochs", type=whole(1, 1000), default=6, help="default: 6")
    p.add_argument("--time-budget", type=positive(DAY), default=200.0, metavar="SECONDS",
                   help="no further seed is begun that would end later; default: 200")  # fmt: skip
    p.add_argument("--output", type=Path, default=Path("build/demo/digits.png"), help="the plot")
    p.add_argument("--threads", type=threads, default=1, metavar="K",
                   help="of the CPU; default: 1, since more get in each other's way where other "
                   "work is running")  # fmt: skip
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    return p


def main(arguments: Sequence[str] | None = None) -> list[list[Run]]:
    """The runs, by seed."""
    p = parser()
    options = p.parse_args(arguments)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        check_picture(options.output, "--output")
        device = device_of(options.device)
    except (OSError, ValueError) as error:
        p.error(str(error))
    torch.set_num_threads(options.threads)
    total = options.seeds * steps_of(options.epochs)
    found: list[list[Run]] = []
    start = time.perf_counter()
    with tqdm(total=total, desc="training three variants", unit="step", dynamic_ncols=True) as bar:
        while len(found) < options.seeds:
            found.append(train(options.epochs, options.first_seed + len(found), device, bar))
            spent = time.perf_counter() - start
            if spent + spent / len(found) > options.time_budget:
                break
    if len(found) < options.seeds:
        print(f"{len(found)} of {options.seeds} seeds: the time budget has no room for another")
    plot(found, device, options.output)
    print(f"\n{table(found)}\n\n{reading(found, device)}\n\nplot: {options.output.resolve()}")
    return found


if __name__ == "__main__":
    main()
