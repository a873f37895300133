"""What the CUDA kernels should take, before they are measured.

For every batch norm of a net: its path, bytes, and time at a given copy bandwidth.

python -m bench.cost_model --device H200 --bandwidth 4.0e12

Time is bytes / bandwidth, nothing else: no launches, no barriers, no cache. Bytes are those of the
path (bnorm_ext.explain): x (in backward x and dy) is read once where it stays on chip; twice in
channels_last, whose blocks and grids keep nothing on chip, and in two passes. What is read again
counts in full, though a part of it comes from the L2: bench.static has a model of that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import bnorm_ext
from bnorm_ext.explain import launch_plan, resolve_device

from .cases import DTYPES
from .nets import NETS, batch_norm_inputs
from .options import Parser, names, positive, whole

SHOWN = ("resnet50", "mobilenet_v2")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def predict(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, tensors: int, device: str
) -> tuple[str, bool, int, int]:
    """Path, whether the tensors stay on chip, bytes moved, and the fewest possible bytes. `tensors`
    is 1 for the forward pass, which reads x, and 2 for the backward pass, which reads x and dy."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])
    plan = launch_plan(x, tensors, resolve_device(device))
    tensor_bytes = math.prod(shape) * dtype.itemsize
    reads = tensors if plan["on_chip"] else 2 * tensors
    moved, least = (reads + 1) * tensor_bytes, (tensors + 1) * tensor_bytes
    return plan["path"], plan["on_chip"], moved, least


def parser(command: str) -> Parser:
    p = Parser(prog=command, description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = p.add_argument
    add("--device", default="H200", help="a GPU that bnorm_ext.explain knows; default: H200")
    add("--bandwidth", type=positive(1e18), required=True, help="of a copy, bytes a second")
    add("--net", nargs="+", metavar="NET", help=f"{', '.join(NETS)}; default: {', '.join(SHOWN)}")
    add("--batch", type=whole(1), nargs="+", default=[32, 64, 256])
    add("--dtype", nargs="+", metavar="D", help=f"{', '.join(DTYPES)}; default: bfloat16, float32")
    add("--layout", nargs="+", metavar="L", help=f"{', '.join(FORMATS)}; default: both")
    add("--sums", action="store_true", help="only the sums over each net")
    return p


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    p = parser(command or f"python -m {__package__}.cost_model")
    o = p.parse_args(arguments)
    try:
        if bnorm_ext.build_info()["cpu_capability"] is None:
            raise ValueError("BNORM_EXT_DISABLE is set: there are no kernels to predict")
        resolve_device(o.device)
        chosen = names(o.net, "--net", tuple(NETS)) or SHOWN
        dtypes = names(o.dtype, "--dtype", tuple(DTYPES)) or ["bfloat16", "float32"]
        layouts = names(o.layout, "--layout", tuple(FORMATS)) or FORMATS
        shapes = {(n, b): batch_norm_inputs(n, b) for n in chosen for b in o.batch}
    except ValueError as error:
        p.error(str(error))
    print(f"{o.device}, {o.bandwidth / 1e12:.2f} TB/s; us, passes one after the other")
    for (net, _), inputs in shapes.items():
        layers = Counter(shape for _, shape in inputs)
        for dtype in dtypes:
            for layout in layouts:
                sums(o, net, layers, DTYPES[dtype], layout)
    return 0


def sums(
    o: Any, net: str, layers: Counter[tuple[int, ...]], dtype: torch.dtype, layout: str
) -> None:
    totals = []
    for tensors, name in ((1, "fwd"), (2, "bwd")):
        moved = floor = on_chip = 0
        for shape, count in layers.items():
            path, stays, these, least = predict(shape, dtype, layout, tensors, o.device)
            moved += count * these
            floor += count * least
            on_chip += count * stays
            if not o.sums:
                size = "x".join(map(str, shape))
                print(
                    f"  {size:18} {str(dtype)[6:]:9} {layout:14} {name} {path:9}"
                    f"{these / 1e6:9.1f} MB {1e6 * these / o.bandwidth:9.1f} us  x {count}"
                )
        totals.append(
            f"{name} {1e6 * moved / o.bandwidth:8.0f} us, floor {1e6 * floor / o.bandwidth:8.0f}, "
            f"on chip {on_chip:2}/{sum(layers.values())}"
        )
    batch = next(iter(layers))[0]
    print(f"{net:13} {batch:4} {str(dtype)[6:]:9} {layout:14} " + "; ".join(totals))


if __name__ == "__main__":
    sys.exit(main())
