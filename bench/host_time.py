"""Host time of one module call on a tensor too small to matter, ours beside native's.

    python bench/host_time.py [--calls N] [--repeats N]

Method: 2 x 8 x 4 x 4 float on the CPU, one thread; blocks of calls of both modules in turn, so that
what else the machine does meets both; the median over the blocks, in microseconds a call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import bnorm_ext


def calls(module: nn.Module, backward: bool) -> Callable[[], None]:
    x = torch.randn(2, 8, 4, 4, requires_grad=backward)
    dy = torch.randn_like(x)
    if backward:
        return lambda: module(x).backward(dy)

    def forward() -> None:
        with torch.no_grad():
            module(x)

    return forward


def microseconds(run: Callable[[], None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="calls in a block")
    parser.add_argument("--repeats", type=int, default=21, help="blocks of each module")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, microseconds a call, median of {options.repeats}")
    print(f"{'':24}{'native':>10}{'bnorm_ext':>12}{'ratio':>8}")
    for training in (True, False):
        for backward in (True, False):
            modules = nn.BatchNorm2d(8), bnorm_ext.BatchNorm2d(8)
            runs = [calls(m.train(training), backward) for m in modules]
            times: list[list[float]] = [[], []]
            for block in range(options.repeats + 1):
                for run, found in zip(runs, times, strict=True):
                    seconds = microseconds(run, options.calls)
                    if block > 0:  # the first one warms up
                        found.append(seconds)
            native, ours = map(statistics.median, times)
            name = f"{'training' if training else 'eval'} {'fwd+bwd' if backward else 'forward'}"
            print(f"{name:24}{native:10.1f}{ours:12.1f}{native / ours:8.2f}")


if __name__ == "__main__":
    main()
