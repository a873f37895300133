"""Where the time of a module's call goes, for one shape.

host: the time that Python and the dispatcher take for a call. It is measured with a layer of the
same rank that computes almost nothing (2 samples, 8 channels, 4 in each further dimension), as the
median over blocks of calls; the modules take turns. call: the median time of single calls at the
given shape, with warm caches and reused memory; on CUDA, the time until they are queued. kernels:
the time on the device in one call, by the profiler; on the CPU, call minus host. launches: the
number of kernels on the device, by the profiler; on the CPU, of operators that were dispatched.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bnorm_ext

from . import machine, report
from .cases import DTYPES, LAYOUTS, Case, ImpossibleCase, check
from .options import Parser, device_of, first_line, names, shape_of, threads

MODULES: dict[str, dict[int, type[nn.Module]]] = {
    name: {2: m.BatchNorm1d, 3: m.BatchNorm1d, 4: m.BatchNorm2d, 5: m.BatchNorm3d}
    for name, m in (("torch", nn), ("bnorm_ext", bnorm_ext))
}
DIRECTIONS = ("forward", "backward")


@dataclass
class Found:
    """The times of one module in one direction, in microseconds."""

    host: float
    call: float
    kernels: float
    launches: int
    names: Counter[str] = field(default_factory=Counter)  #: time of each kernel or operator


def blocks(module: nn.Module, x: Tensor, dy: Tensor, calls: int) -> tuple[float, float]:
    """Microseconds per call of forward and of backward, until the host is done."""
    start = time.perf_counter()
    outputs = [module(x) for _ in range(calls)]
    middle = time.perf_counter()
    for y in outputs:
        x.grad = None
        y.backward(dy)
    end = time.perf_counter()
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e6 * (middle - start) / calls, 1e6 * (end - middle) / calls


def times(
    modules: Sequence[nn.Module], x: Tensor, dy: Tensor, calls: int, count: int
) -> list[tuple[float, float]]:
    """Medians over the blocks, for each module; the modules take turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in modules]
    for _ in range(count + 3):
        for module, samples in zip(modules, found, strict=True):
            samples.append(blocks(module, x, dy, calls))
    return [
        (statistics.median(f for f, _ in s[3:]), statistics.median(b for _, b in s[3:]))
        for s in found
    ]


def launches(call: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Microseconds of each kernel on CUDA; on the CPU, of each operator without the operators that
    it calls. Each name starts with the number of times that it ran."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    call()  # a first call, so that the profiled one finds memory and caches as usual
    with profile(activities=activities) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    often: Counter[str] = Counter()
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA") != cuda or ("::" not in event.name and not cuda):
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[event.name] += own
        often[event.name] += 1
    return Counter({f"{often[name]} x {name}": us for name, us in spent.most_common()})


def count(names: Counter[str]) -> int:
    return sum(int(name.split(" x ", 1)[0]) for name in names)


def examine(case: Case, names: Sequence[str], device: torch.device) -> dict[str, list[Found]]:
    """The times of each provider, forward and backward."""

    def tensors(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, dy = (
            torch.randn(*shape, device=device)
            .to(DTYPES[case.dtype])
            .contiguous(memory_format=case.memory_format)
            for _ in range(2)
        )
        return x.requires_grad_(), dy

    machine.fresh_outputs(False)
    rank = len(case.shape)
    small = (2, 8, *[4] * (rank - 2))

    def modules(channels: int) -> list[nn.Module]:
        made = [MODULES[name][rank](channels) for name in names]
        # With 16-bit data the parameters are float32, as under autocast.
        kind = torch.float64 if case.dtype == "float64" else torch.float32
        return [m.to(device, kind) for m in made]

    host = times(modules(small[1]), *tensors(small), calls=200, count=31)
    x, dy = tensors(case.shape)
    large = modules(case.shape[1])
    call = times(large, x, dy, calls=1, count=31)
    found = {}
    for i, (name, module) in enumerate(zip(names, large, strict=True)):
        y = module(x)

        def backward(y: Tensor = y, module: nn.Module = module) -> None:
            x.grad = None
            module.zero_grad()
            y.backward(dy, retain_graph=True)

        profiled = (launches(functools.partial(module, x), device), launches(backward, device))
        found[name] = [
            Found(
                host[i][d],
                call[i][d],
                sum(profiled[d].values())
                if device.type == "cuda"
                else max(call[i][d] - host[i][d], 0.0),
                count(profiled[d]),
                profiled[d],
            )
            for d in range(2)
        ]
    return found


def table(found: dict[str, list[Found]]) -> str:
    lines = [["", "", "host, us", "call, us", "kernels, us", "launches"]]
    for direction, name in enumerate(DIRECTIONS):
        for provider, both in found.items():
            f = both[direction]
            numbers = [f"{value:.1f}" for value in (f.host, f.call, f.kernels)]
            lines.append([name, provider, *numbers, str(f.launches)])
    text = report.aligned(lines, left=2)
    for direction, name in enumerate(DIRECTIONS):
        for provider, both in found.items():
            text += ["", f"{provider}, {name}, as profiled:"]
            text += [
                f"{us:12.1f} us  {what[:120]}" for what, us in both[direction].names.most_common(6)
            ]
    return "\n".join(text)


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--shape", default="32,64,56,56", metavar="N,C,H,W")
    p.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    p.add_argument("--layout", default=LAYOUTS[0], choices=LAYOUTS)
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--provider", nargs="+", metavar="P", help=", ".join(MODULES))
    p.add_argument("--threads", type=threads, default=1, metavar="K", help="default: 1")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}.profile"
    p = parser(command)
    o = p.parse_args(arguments)
    try:
        chosen = names(o.provider, "--provider", tuple(MODULES)) or list(MODULES)
        case = Case(shape_of(o.shape), o.dtype, o.layout, pass_="fwd+bwd")
        check(case)
        if len(case.shape) > 5:
            raise ImpossibleCase(f"shape {o.shape}: modules take 2 to 5 dimensions")
        device = device_of(o.device)
        # x, dy, both in float32 too, and for each module y and the gradient of x.
        tensors = 6 + 2 * len(chosen)
        machine.check_memory(str(case), tensors * case.tensor_bytes, device)
    except ValueError as error:
        p.error(str(error))
    torch.set_num_threads(o.threads)
    try:
        found = examine(case, chosen, device)
    except (MemoryError, RuntimeError) as error:
        if not machine.is_out_of_memory(error):
            raise
        p.error(f"out of memory: {first_line(error)}")
    header = machine.header(device, command, arguments)
    print(report.title(header), table(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
