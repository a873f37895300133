"""The GPUs that ``explain`` knows by name, and the figures of one that is here."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

_KB = 1024
_MB = 1 << 20


class Device(NamedTuple):
    name: str
    multiprocessors: int
    capability: tuple[int, int]
    shared_per_multiprocessor: int  # bytes
    shared_per_block: int  # bytes, the maximum that a kernel can opt in to
    l2_bytes: int  # 0: unknown
    gigabytes_per_second: int  # of memory; 0: unknown
    clock_mhz: int  # of a multiprocessor; 0: unknown

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
# Multiprocessors, compute capability, MB of L2, GB/s of memory and MHz (boost), from the vendor's
# data sheets; the L2 of an H200 is what one has reported (bench/results/cuda-terms.json).
GPUS = {
    "T4": (40, (7, 5), 4, 320, 1590),
    "A100": (108, (8, 0), 40, 2039, 1410),
    "A30": (56, (8, 0), 24, 933, 1440),
    "A10": (72, (8, 6), 6, 600, 1695),
    "RTX 3090": (82, (8, 6), 6, 936, 1695),
    "RTX 4090": (128, (8, 9), 72, 1008, 2520),
    "L4": (58, (8, 9), 48, 300, 2040),
    "L40": (142, (8, 9), 96, 864, 2490),
    "L40S": (142, (8, 9), 96, 864, 2520),
    "H100": (132, (9, 0), 50, 3350, 1980),
    "H100 PCIe": (114, (9, 0), 50, 2000, 1755),
    "H200": (132, (9, 0), 60, 4800, 1980),
    "GH200": (132, (9, 0), 50, 4000, 1980),
    "B200": (148, (10, 0), 126, 8000, 1965),
    "B300": (148, (10, 3), 126, 8000, 1920),
    "RTX 5090": (170, (12, 0), 96, 1792, 2407),
}

# Words in the names that CUDA reports which do not tell GPUs apart: vendor, memory size, and board.
_VENDOR = re.compile(r"nvidia|tesla|geforce|graphics|\d+gb?|hbm3e?")
_BOARD = re.compile(r"pcie|sxm\d*|nvl|ac")


def resolve_device(device: str | torch.device | None) -> Device:
    """A GPU of the table by its name, or a CUDA device of this machine."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(device, str):
        for index in range(here):
            if torch.cuda.get_device_name(index) == device:
                return _measured(torch.device("cuda", index))
        name = _known_name(device)
        if name is not None:
            multiprocessors, capability, l2, bandwidth, clock = GPUS[name]
            of_multiprocessor, of_block = (n * _KB for n in _SHARED[capability])
            return Device(
                name, multiprocessors, capability, of_multiprocessor, of_block, l2 * _MB,
                bandwidth, clock,
            )  # fmt: skip
    known = ", ".join(GPUS)
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
    names = {name.lower().replace(" ", ""): name for name in GPUS}
    words = [w for w in re.split(r"[\s,_-]+", text.lower()) if w and not _VENDOR.fullmatch(w)]
    for given in (words, [w for w in words if not _BOARD.fullmatch(w)]):
        if "".join(given) in names:
            return names["".join(given)]
    return None


def _measured(wanted: torch.device) -> Device:
    p: Any = torch.cuda.get_device_properties(wanted)
    return Device(
        p.name,
        p.multi_processor_count,
        (p.major, p.minor),
        p.shared_memory_per_multiprocessor,
        p.shared_memory_per_block_optin,
        p.L2_cache_size,
        # kHz and bits; memory transfers at both edges of its clock. Older torches do not say.
        2 * getattr(p, "memory_clock_rate", 0) * getattr(p, "memory_bus_width", 0) // 8 // 10**6,
        getattr(p, "clock_rate", 0) // 1000,
    )
