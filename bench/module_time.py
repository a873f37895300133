"""Time of a training step of one module, forward and backward apart, ours beside native's.

    python bench/module_time.py                                        # host time of a tiny layer
    python bench/module_time.py --shape 32,64,56,56 --threads 2 --calls 1

Method: float on the CPU; blocks of calls, all of one module and then all of the other, each after a
few that are not counted; the median over the blocks, in microseconds a call. `clone` and `add` are
x.clone() and x + dy, operations with as many bytes as the least that forward and backward move.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import bnorm_ext


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(f for f, _ in runs), statistics.median(b for _, b in runs)


def measure(
    module: nn.Module, x: torch.Tensor, dy: torch.Tensor, calls: int
) -> tuple[float, float]:
    """Seconds of forward and backward in one block."""
    start = time.perf_counter()
    outputs = [module(x) for _ in range(calls)]
    middle = time.perf_counter()
    for y in outputs:
        x.grad = None
        y.backward(dy)
    return (middle - start) / calls, (time.perf_counter() - middle) / calls


def elementwise(run: Callable[[], torch.Tensor], blocks: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return statistics.median([once() for _ in range(blocks)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2,8,4,4", help="N,C,H,W")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=200, help="calls in a block")
    parser.add_argument("--blocks", type=int, default=41, help="blocks of each module")
    options = parser.parse_args()
    shape = [int(size) for size in options.shape.split(",")]
    torch.set_num_threads(options.threads)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    found = {}
    for name, cls in (("native", nn.BatchNorm2d), ("bnorm_ext", bnorm_ext.BatchNorm2d)):
        module = cls(shape[1])
        runs = [measure(module, x, dy, options.calls) for _ in range(options.blocks + 5)]
        found[name] = median(runs[5:])
    plain = x.detach()
    floor = (
        elementwise(plain.clone, options.blocks),
        elementwise(lambda: plain + dy, options.blocks),
    )
    print(f"torch {torch.__version__}, {options.shape} float, {options.threads} threads")
    print(f"{'microseconds':14}{'native':>10}{'bnorm_ext':>12}{'ratio':>8}{'clone, add':>13}")
    for i, direction in enumerate(("forward", "backward")):
        native, ours = found["native"][i] * 1e6, found["bnorm_ext"][i] * 1e6
        print(f"{direction:14}{native:10.1f}{ours:12.1f}{native / ours:8.2f}{floor[i] * 1e6:13.1f}")


if __name__ == "__main__":
    main()
