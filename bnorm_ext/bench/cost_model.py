"""What the CUDA kernels should take, before they are measured.

For every batch norm of a net: its path, bytes, and time at a given copy bandwidth.

python -m bench.cost_model --device H200 --bandwidth 4.0e12

Time is bytes / bandwidth, nothing else: no launches, no barriers, no cache. Bytes are those of the
path (bnorm_ext.explain): x is read once or twice in forward, x and dy once or twice in backward.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

import torch

from bnorm_ext.explain import launch_plan, resolve_device

from .nets import NETS, batch_norm_inputs

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def predict(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, tensors: int, device: str
) -> tuple[str, int, int]:
    """Path, bytes, and bytes at the floor of a forward (1 tensor on chip) or backward (2) pass."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])
    plan = launch_plan(x, tensors, resolve_device(device))
    tensor_bytes = math.prod(shape) * dtype.itemsize
    reads = tensors if plan["path"] != "two_pass" else 2 * tensors
    return plan["path"], (reads + 1) * tensor_bytes, (tensors + 1) * tensor_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="H200", help="a GPU that bnorm_ext.explain knows")
    parser.add_argument("--bandwidth", type=float, required=True, help="of a copy, bytes a second")
    parser.add_argument("--net", nargs="+", default=["resnet50", "mobilenet_v2"], choices=NETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layout", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--sums", action="store_true", help="only the sums over each net")
    o = parser.parse_args()
    print(f"{o.device}, {o.bandwidth / 1e12:.2f} TB/s; us, passes one after the other")
    for net in o.net:
        for batch in o.batch:
            layers = Counter(shape for _, shape in batch_norm_inputs(net, batch))
            for dtype in o.dtype:
                for layout in o.layout:
                    sums(o, net, layers, getattr(torch, dtype), layout)


def sums(o: Any, net: str, layers: Counter, dtype: torch.dtype, layout: str) -> None:
    totals = []
    for tensors, name in ((1, "fwd"), (2, "bwd")):
        moved = floor = on_chip = 0
        for shape, count in layers.items():
            path, these, least = predict(shape, dtype, layout, tensors, o.device)
            moved += count * these
            floor += count * least
            on_chip += count * (path != "two_pass")
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
    main()
