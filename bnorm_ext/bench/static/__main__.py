"""What the compiled CUDA kernels do per element, and what follows for a GPU. It needs nvcc, no GPU.

python -m bench.static --arch 80 90            instructions per element, by kernel
python -m bench.static --gpu H200 A100         predicted times of nets' batch norms
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnorm_ext.activations import NAMES

from ..cases import DTYPES
from ..cost_model import FORMATS
from ..nets import NETS, batch_norm_inputs
from ..options import Parser, names, whole
from .compile import Missing, tools
from .gpus import MEMORY, gpu
from .kernels import KERNELS, Counts
from .predict import counts, predict

ARCHS = (75, 80, 86, 89, 90, 100, 120)


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--arch", type=whole(1), nargs="+", help=f"{', '.join(map(str, ARCHS))}; default: 80, 90")
    add("--act", default="identity", choices=NAMES)
    add("--gpu", nargs="+", metavar="GPU", help=f"predict times: {', '.join(MEMORY)}")
    add("--net", nargs="+", metavar="NET", help="default: resnet50, mobilenet_v2")
    add("--batch", type=whole(1), nargs="+", default=[64])
    add("--dtype", nargs="+", metavar="D", help="default: bfloat16, float32")
    add("--layers", action="store_true", help="every layer, not only the sums over each net")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = parser(command or f"python -m {__package__}")
    o = p.parse_args(arguments)
    try:
        for arch in o.arch or ():
            if arch not in ARCHS:
                raise ValueError(f"--arch: {arch} is none of {', '.join(map(str, ARCHS))}")
        for name in o.gpu or ():
            gpu(name)
        tools()
        if o.gpu:
            times(o)
        else:
            instructions(o)
    except (Missing, ValueError) as error:
        p.error(str(error))
    return 0


def instructions(o: Any) -> None:
    print(f"{'':34}per element of x, {o.act}; rest: instructions outside of the loops")
    print(
        f"{'kernel':26}{'dtype':9}{'width':>6} {'mapping':15}{'sm':>4}{'regs':>5}{'all':>6}"
        f"{'fp64':>6}{'conv':>6}{'mufu':>6}{'shared':>7}{'rest':>6}   by loop"
    )
    for arch in o.arch or (80, 90):
        for kernel in KERNELS:
            for c in counts(kernel, arch, o.act):
                print(_line(c))


def _line(c: Counts) -> str:
    kinds = ("conversions", "conversions64", "conversions16")
    conversions = sum(c.per_element(kind) for kind in kinds)
    shared = c.per_element("shared loads") + c.per_element("shared stores")
    by_loop = ", ".join(f"{loop.role} {loop.per_element():.1f}" for loop in c.loops)
    return (
        f"{c.kernel.name:26}{c.dtype:9}{c.width:6} {c.mapping:15}{c.arch:4}{c.registers:5}"
        f"{c.per_element():6.1f}{c.per_element('fp64'):6.2f}{conversions:6.2f}"
        f"{c.per_element('special'):6.2f}{shared:7.2f}{c.rest.instructions:6}   {by_loop}"
    )


def times(o: Any) -> None:
    dtypes = names(o.dtype, "--dtype", tuple(DTYPES)) or ["bfloat16", "float32"]
    nets = names(o.net, "--net", tuple(NETS)) or ("resnet50", "mobilenet_v2")
    print(
        "predicted, not measured: the floor's share of the time (geometric mean), the least layer"
    )
    for name in o.gpu:
        g = gpu(name)
        for net in nets:
            for batch in o.batch:
                layers = Counter(shape for _, shape in batch_norm_inputs(net, batch))
                for dtype in dtypes:
                    for layout in FORMATS:
                        _net(o, g, f"{net} {batch}", layers, DTYPES[dtype], layout)


def _net(o: Any, g: Any, title: str, layers: Any, dtype: Any, layout: str) -> None:
    for tensors, direction in ((1, "fwd"), (2, "bwd")):
        shares: list[float] = []
        total = floor = 0.0
        binding: Counter[str] = Counter()
        for shape, count in layers.items():
            layer = predict(shape, dtype, layout, tensors, g)
            shares += [layer.floor / layer.time] * count
            total += count * layer.time
            floor += count * layer.floor
            binding[layer.binds] += count
            if o.layers:
                print(
                    f"  {'x'.join(map(str, shape)):18} {direction} {layer.path:9}"
                    f"{1e6 * layer.time:8.1f} us, floor {1e6 * layer.floor:8.1f} "
                    f"({shares[-1]:4.0%}), {layer.binds} x {count}"
                )
        mean = float(np.exp(np.mean(np.log(shares))))
        print(
            f"{g.name:9} {title:17} {str(dtype)[6:]:9} {layout:14} {direction} "
            f"{1e6 * total:8.0f} us, floor {1e6 * floor:8.0f}; share {mean:4.0%}, least "
            f"{min(shares):4.0%}; binds: {', '.join(f'{n} {k}' for k, n in binding.most_common())}"
        )


if __name__ == "__main__":
    sys.exit(main())
