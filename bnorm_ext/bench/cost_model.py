"""What the CUDA kernels take, predicted by the model that the planner chooses by. It needs no GPU.

For every batch norm of a net: its path, the predicted time, and what that mostly consists of.

python -m bench.cost_model --device H200 L4
python -m bench.cost_model --table > bench/results/predicted.md

The model is csrc/cuda/cost.h. The floor is an empty launch and the fewest bytes at the rate of a
copy; "of a copy" is the floor over the predicted time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import bnorm_ext
from bnorm_ext._gpus import Device, resolve_device
from bnorm_ext.explain import TERMS, binding, is_predicted, launch_plan

from .cases import DTYPES
from .nets import NETS, batch_norm_inputs
from .options import Parser, names, positive, whole

SHOWN = ("resnet50", "mobilenet_v2")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Of the bandwidth in a data sheet, what a copy reaches (kCopyShare in csrc/cuda/cost.h).
COPY_SHARE = 0.875


@dataclass(frozen=True)
class Prediction:
    """Forward or backward of one batch norm in training; microseconds."""

    path: str
    on_chip: bool
    times: dict[str, float]  # contributions
    two_passes: float  # the same in two passes, as torch's own kernels take
    floor: float

    @property
    def time(self) -> float:
        return sum(self.times.values())

    @property
    def binds(self) -> str:
        return TERMS[binding(self.times)]


def predict(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, tensors: int, gpu: Device
) -> Prediction:
    """Without an activation, a residual or a mask. `tensors` is 1 for the forward pass, which reads
    x, and 2 for the backward pass, which reads x and dy."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])
    plan = launch_plan(x, tensors, gpu)
    return Prediction(
        plan["path"], plan["on_chip"], plan["times"], plan["two_passes"], plan["floor"]
    )


def mean_share(parts: Sequence[tuple[float, float, int]]) -> float:
    """The geometric mean of floor / time, of (floor, time, how often)."""
    total = sum(count for _, _, count in parts)
    return math.exp(sum(count * math.log(floor / time) for floor, time, count in parts) / total)


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--device", nargs="+", default=["H200"], metavar="GPU",
        help="GPUs that bnorm_ext.explain knows; default: H200")  # fmt: skip
    add("--bandwidth", type=positive(1e18), metavar="B",
        help="of a copy, bytes a second; default: 0.875 of what the data sheet says")  # fmt: skip
    add("--net", nargs="+", metavar="NET", help=f"{', '.join(NETS)}; default: {', '.join(SHOWN)}")
    add("--batch", type=whole(1), nargs="+", default=[32, 64, 256])
    add("--dtype", nargs="+", metavar="D", help=f"{', '.join(DTYPES)}; default: bfloat16, float32")
    add("--layout", nargs="+", metavar="L", help=f"{', '.join(FORMATS)}; default: both")
    add("--sums", action="store_true", help="only the sums over each net")
    add("--table", action="store_true", help="the text of bench/results/predicted.md")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = parser(command or f"python -m {__package__}.cost_model")
    o = p.parse_args(arguments)
    try:
        if bnorm_ext.build_info()["cpu_capability"] is None:
            raise ValueError("BNORM_EXT_DISABLE is set: there are no kernels to predict")
        gpus = [resolve_device(name) for name in o.device]
        if o.bandwidth:
            sheet = round(o.bandwidth / COPY_SHARE / 1e9)
            gpus = [gpu._replace(gigabytes_per_second=max(1, sheet)) for gpu in gpus]
        chosen = names(o.net, "--net", tuple(NETS)) or SHOWN
        dtypes = names(o.dtype, "--dtype", tuple(DTYPES)) or ["bfloat16", "float32"]
        layouts = names(o.layout, "--layout", tuple(FORMATS)) or FORMATS
        for gpu in gpus:
            for dtype in dtypes:
                if not is_predicted(DTYPES[dtype], gpu):
                    raise ValueError(f"there is no prediction of {dtype} on {gpu.name}")
        shapes = {(n, b): batch_norm_inputs(n, b) for n in chosen for b in o.batch}
    except ValueError as error:
        p.error(str(error))
    if o.table:
        from .predicted_table import table

        print(table(), end="")
        return 0
    print("predicted, not measured; us, passes one after the other")
    for gpu in gpus:
        for (net, _), inputs in shapes.items():
            layers = Counter(shape for _, shape in inputs)
            for dtype in dtypes:
                for layout in layouts:
                    sums(o, gpu, net, layers, DTYPES[dtype], layout)
    return 0


def sums(
    o: Any, gpu: Device, net: str, layers: Counter[tuple[int, ...]], dtype: torch.dtype, layout: str
) -> None:
    totals = []
    for tensors, name in ((1, "fwd"), (2, "bwd")):
        found = {shape: predict(shape, dtype, layout, tensors, gpu) for shape in layers}
        if not o.sums:
            for shape, count in layers.items():
                one, size = found[shape], "x".join(map(str, shape))
                print(
                    f"  {size:18} {str(dtype)[6:]:9} {layout:14} {name} {one.path:9}"
                    f"{one.time:9.1f} us, {one.floor / one.time:4.0%} of a copy, "
                    f"{one.binds} x {count}"
                )
        parts = [(one.floor, one.time, layers[shape]) for shape, one in found.items()]
        binds = Counter[str]()
        for shape, one in found.items():
            binds[one.binds] += layers[shape]
        on_chip = sum(layers[shape] * one.on_chip for shape, one in found.items())
        totals.append(
            f"{name} {sum(time * count for _, time, count in parts):8.0f} us, "
            f"{mean_share(parts):4.0%} of a copy, on chip {on_chip:2}/{sum(layers.values())}, "
            + ", ".join(f"{count} {term}" for term, count in binds.most_common())
        )
    batch = next(iter(layers))[0]
    print(f"{gpu.name:9} {net:13} {batch:4} {str(dtype)[6:]:9} {layout:14} " + "; ".join(totals))


if __name__ == "__main__":
    sys.exit(main())
