"""What the compiled CUDA kernels do per element. It needs nvcc, no GPU.

python -m bench.static --arch 80 90            instructions per element, by kernel
python -m bench.static --gpu T4 H200           which unit is busiest while memory moves the bytes
python -m bench.static --conflicts             bank conflicts, by the emulator; needs no nvcc
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bnorm_ext._gpus import GPUS
from bnorm_ext.activations import NAMES

from ..options import Parser, names, whole
from .compile import Missing, tools
from .instances import counts
from .kernels import KERNELS, Counts
from .units import busy, compiled_for, rates_of

ARCHS = (75, 80, 86, 89, 90, 100, 120)


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--arch", type=whole(1), nargs="+", help=f"{', '.join(map(str, ARCHS))}; default: 80, 90")
    add("--kernel", nargs="+", metavar="K", help=f"default: all of {', '.join(_names())}")
    add("--act", default="identity", choices=NAMES)
    add("--gpu", nargs="+", metavar="GPU", help=f"the units of: {', '.join(GPUS)}")
    add("--conflicts", action="store_true", help="how many turns accesses to shared memory take")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = parser(command or f"python -m {__package__}")
    o = p.parse_args(arguments)
    try:
        for arch in o.arch or ():
            if arch not in ARCHS:
                raise ValueError(f"--arch: {arch} is none of {', '.join(map(str, ARCHS))}")
        for name in o.gpu or ():
            rates_of(name)
        o.kernel = names(o.kernel, "--kernel", _names()) or _names()
        if o.conflicts:
            from .conflicts import report

            report(o.kernel)
            return 0
        tools()
        if o.gpu:
            units(o)
        else:
            instructions(o)
    except (Missing, ValueError) as error:
        p.error(str(error))
    return 0


def _names() -> tuple[str, ...]:
    return tuple(kernel.name for kernel in KERNELS)


def instructions(o: Any) -> None:
    print(
        f"{'':34}per element of x, {o.act}; rest: instructions outside of the loops; blocks: of a "
        "multiprocessor, by registers; KB: that these load in one pass through a loop"
    )
    print(
        f"{'kernel':26}{'dtype':9}{'width':>6} {'mapping':15}{'sm':>4}{'regs':>5}{'all':>6}"
        f"{'fp64':>6}{'conv':>6}{'mufu':>6}{'shared':>7}{'rest':>6}{'blocks':>7}{'KB':>5}   by loop"
    )
    for arch in o.arch or (80, 90):
        for kernel in KERNELS:
            if kernel.name in o.kernel:
                for c in counts(kernel, arch, o.act):
                    print(_line(c), flush=True)


def _line(c: Counts) -> str:
    kinds = ("conversions", "conversions64", "conversions16")
    conversions = sum(c.per_element(kind) for kind in kinds)
    shared = c.per_element("shared loads") + c.per_element("shared stores")
    by_loop = ", ".join(f"{loop.role} {loop.per_element():.1f}" for loop in c.loops)
    return (
        f"{c.kernel.name:26}{c.dtype:9}{c.width:6} {c.mapping:15}{c.arch:4}{c.registers:5}"
        f"{c.per_element():6.1f}{c.per_element('fp64'):6.2f}{conversions:6.2f}"
        f"{c.per_element('special'):6.2f}{shared:7.2f}{c.rest.instructions:6}{c.blocks:7}"
        f"{c.in_flight // 1024:5}   {by_loop}"
    )


def units(o: Any) -> None:
    print("time of the busiest units over that of memory, which moves the bytes at a copy's rate")
    for name in o.gpu:
        device, rates = rates_of(name)
        for kernel in KERNELS:
            if kernel.name not in o.kernel:
                continue
            for c in counts(kernel, compiled_for(device)):
                found = sorted(busy(c, device, rates).items(), key=lambda unit: -unit[1])
                listed = ", ".join(f"{unit} {share:.2f}" for unit, share in found[:3] if share)
                binds = "memory" if found[0][1] <= 1 else found[0][0].upper()
                print(
                    f"{device.name:9} {kernel.name:26}{c.dtype:9}{c.width:6} {c.mapping:15} "
                    f"binds: {binds:14} {listed}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
