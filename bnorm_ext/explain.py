"""``explain``: how the CUDA kernels would run a batch norm. It needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cuda import processes as ranks
from ._load import load

_KB = 1024
_MB = 1 << 20


class _Device(NamedTuple):
    name: str
    multiprocessors: int
    capability: tuple[int, int]
    shared_per_multiprocessor: int  # bytes
    shared_per_block: int  # bytes, the maximum that a kernel can opt in to
    l2_bytes: int  # 0: unknown

    @property
    def clusters(self) -> bool:
        return self.capability >= (9, 0)


# Shared memory by compute capability, of a multiprocessor and of a block, in KB (CUDA C++
# Programming Guide, technical specifications per compute capability).
_SHARED = {
    (7, 5): (64, 64),
    (8, 0): (164, 163),
    (8, 6): (100, 99),
    (8, 9): (100, 99),
    (9, 0): (228, 227),
    (10, 0): (228, 227),
    (10, 3): (228, 227),
    (12, 0): (100, 99),
}
# Multiprocessors, compute capability and MB of L2, from the vendor's data sheets; the L2 of an H200
# is what one has reported (bench/results/cuda-terms.json).
_GPUS = {
    "T4": (40, (7, 5), 4),
    "A100": (108, (8, 0), 40),
    "A30": (56, (8, 0), 24),
    "A10": (72, (8, 6), 6),
    "RTX 3090": (82, (8, 6), 6),
    "RTX 4090": (128, (8, 9), 72),
    "L4": (58, (8, 9), 48),
    "L40": (142, (8, 9), 96),
    "L40S": (142, (8, 9), 96),
    "H100": (132, (9, 0), 50),
    "H100 PCIe": (114, (9, 0), 50),
    "H200": (132, (9, 0), 60),
    "GH200": (132, (9, 0), 50),
    "B200": (148, (10, 0), 126),
    "B300": (148, (10, 3), 126),
    "RTX 5090": (170, (12, 0), 96),
}

# Words in the names that CUDA reports which do not tell GPUs apart: vendor, memory size, and board.
_VENDOR = re.compile(r"nvidia|tesla|geforce|graphics|\d+gb?|hbm3e?")
_BOARD = re.compile(r"pcie|sxm\d*|nvl|ac")


def explain(
    input: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: str | torch.device | None = None,
    processes: int | None = None,
) -> str:
    """Describes how the CUDA kernels would run a batch norm in training.

    Args:
        input: a tensor (N, C, ...) on any device, or its shape.
        dtype: dtype of the tensor. Default: its own, or float32 for a shape.
        memory_format: memory format of the tensor. Default: its own, or contiguous for a shape.
        device: name of a GPU (A100, H200, RTX 4090, ..., or as CUDA reports it: NVIDIA H100 80GB
            HBM3), or a CUDA device of this machine. Default: the device of the tensor, or the
            current CUDA device.
        processes: how many train together in ``torch.distributed``. With more than one, no
            cooperative grid is taken: it and the collectives would wait for each other. Default:
            the ranks of this process's default group, or 1.

    Returns:
        A text that says for the forward and the backward pass which path is taken, its teams of
        blocks, whether the tensor stays on chip or is read twice, the second time partly from the
        L2, how often it is read and written, and why two launches are taken. It follows from the
        limits of the device. Under MPS or MIG less of the device is available; a launch may then be
        refused, and two passes are taken.

    Raises:
        ValueError: a shape without channels or elements, or a device that is neither known nor
            present.
    """
    if isinstance(input, Tensor):
        x = input.detach().to("meta")
        device = device if device is not None or not input.is_cuda else input.device
    else:
        x = torch.empty(tuple(input), dtype=dtype or torch.float32, device="meta")
    if dtype is not None:
        x = x.to(dtype)
    if memory_format is not None:
        x = x.contiguous(memory_format=memory_format)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"explain: expected a tensor (N, C, ...) with elements, got {list(x.shape)}"
        )
    gpu = resolve_device(device)
    if load() is None:
        return "BNORM_EXT_DISABLE is set: torch's own batch norm runs"
    shape = "x".join(map(str, x.shape))
    lines: list[str] = []
    for name, tensors in (("forward", 1), ("backward", 2)):
        plan = launch_plan(x, tensors, gpu, beside_collectives=(processes or ranks()) > 1)
        if not lines:
            layout = "channels last" if plan["channels_last"] else "channels first"
            major, minor = gpu.capability
            lines.append(
                f"{shape} {str(x.dtype)[6:]}, {layout}, on {gpu.name} (sm_{major}{minor}, "
                f"{gpu.multiprocessors} multiprocessors)"
            )
        first, *more = _describe(plan, tensors)
        lines += [f"{name}: {first}", *more]
    return "\n".join(lines)


def launch_plan(
    x: Tensor, tensors: int, gpu: _Device, *, beside_collectives: bool = False
) -> dict[str, Any]:
    """The launch plan of the forward pass (`tensors` is 1: it reads x) or the backward pass (2: x
    and dy), as a dictionary. `on_chip`: they are read once; else twice, in one launch or, where
    `path` is "two_pass", in two."""
    compiled: Any = load()
    plan: dict[str, Any] = compiled.explain_plan(
        x, tensors, gpu.multiprocessors, gpu.shared_per_multiprocessor, gpu.shared_per_block,
        gpu.l2_bytes, gpu.clusters, aligned=True, beside_collectives=beside_collectives,
    )  # fmt: skip
    return plan


def resolve_device(device: str | torch.device | None) -> _Device:
    """A GPU of the table by its name, or a CUDA device of this machine."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(device, str):
        for index in range(here):
            if torch.cuda.get_device_name(index) == device:
                return _measured(torch.device("cuda", index))
        name = _known_name(device)
        if name is not None:
            multiprocessors, capability, l2 = _GPUS[name]
            of_multiprocessor, of_block = (n * _KB for n in _SHARED[capability])
            return _Device(name, multiprocessors, capability, of_multiprocessor, of_block, l2 * _MB)
    known = ", ".join(_GPUS)
    try:
        wanted = torch.device(device if device is not None else "cuda")
    except RuntimeError as error:
        raise ValueError(f"explain: unknown device {device!r}; known are {known}") from error
    if wanted.type != "cuda" or (wanted.index or 0) >= here:
        raise ValueError(
            f"explain: {str(wanted)!r} is no CUDA device of this machine; name one: {known}"
        )
    return _measured(wanted)


def _known_name(text: str) -> str | None:
    """The GPU of the table that a name means. A name with further words (RTX 4090 Laptop GPU, H100
    80GB HBM3 MIG 1g.10gb) means another GPU."""
    names = {name.lower().replace(" ", ""): name for name in _GPUS}
    words = [w for w in re.split(r"[\s,_-]+", text.lower()) if w and not _VENDOR.fullmatch(w)]
    for given in (words, [w for w in words if not _BOARD.fullmatch(w)]):
        if "".join(given) in names:
            return names["".join(given)]
    return None


def _measured(wanted: torch.device) -> _Device:
    p: Any = torch.cuda.get_device_properties(wanted)
    return _Device(
        p.name,
        p.multi_processor_count,
        (p.major, p.minor),
        p.shared_memory_per_multiprocessor,
        p.shared_memory_per_block_optin,
        p.L2_cache_size,
    )


def _describe(plan: dict[str, Any], tensors: int) -> list[str]:
    path, team, tiles = plan["path"], plan["team"], plan["tiles"]
    reads, of = tensors, "x" if tensors == 1 else "x and dy"
    each, threads = _channels(plan["channels"]), f"{plan['threads']} threads"
    access = f"{plan['access_bytes']}-byte accesses"
    if path == "two_pass":
        return [
            f"two passes, {2 * reads} reads + 1 write: {plan['reason']}",
            f"  {tiles} x {team} blocks, {each} each; {threads} a block, {access}",
        ]
    teams = {
        "block": f"{plan['teams']} blocks",
        "cluster": f"{plan['teams']} clusters of {team} blocks",
        "grid": f"{plan['teams']} team{'s' * (plan['teams'] > 1)} of {team} blocks in a "
        "cooperative grid",
    }[path]
    several = plan["teams"] < tiles
    all_of_them = f"{tiles} channels" if plan["channels"] == 1 else f"{tiles} groups of {each}"
    work = f", which take {all_of_them} in turn" if several else f", {each} each"
    if plan["on_chip"]:
        way = f"keeps {of} on chip: {reads} read{'s' * (reads > 1)}"
    else:
        way = f"reads {of} twice, the second time partly from the L2: {2 * reads} reads"
    lines = [
        f"one launch that {way} + 1 write",
        f"  {teams}{work}; {threads} and {plan['shared_bytes'] / _KB:.1f} KB of shared memory a "
        f"block, {access}",
    ]
    if path != "block":
        tile, share = plan["tile_bytes"], plan["share_bytes"]
        lines.append(
            f"  a team, since {each} {'is' if plan['channels'] == 1 else 'are'} {tile / _KB:.0f} "
            f"KB, and a block has {share / _KB:.0f} KB"
            if plan["on_chip"] and tile > share
            else "  a team, so that all multiprocessors have work"
        )
    return lines


def _channels(count: int) -> str:
    return "a channel" if count == 1 else f"{count} channels"
