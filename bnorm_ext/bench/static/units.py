"""How busy the units of a multiprocessor are while memory moves what a kernel has to move."""

from __future__ import annotations

from bnorm_ext._gpus import Device, resolve_device

from .gpus import RATES, Rates
from .kernels import Counts

#: A plain copy of a large tensor reaches this share of the data sheet's bandwidth. Measured on an
#: H200 (4.2 of 4.8 TB/s), assumed for all others; kCopyShare in csrc/cuda/cost.h.
COPY = 0.875
_SHARED = ("LDS", "STS", "LDGSTS")


def rates_of(name: str) -> tuple[Device, Rates]:
    """Raises ValueError for a GPU that is not known."""
    device = resolve_device(name)
    if device.capability not in RATES or not device.gigabytes_per_second:
        raise ValueError(f"no rates of {device.name}")
    return device, RATES[device.capability]


def compiled_for(device: Device) -> int:
    """The architecture whose machine code runs on it, of those that are read."""
    major, minor = device.capability
    return 100 if major == 10 else 10 * major + minor


def busy(counts: Counts, device: Device, rates: Rates) -> dict[str, float]:
    """For each unit its time over that in which the bytes of the main loops move at the rate of a
    copy: above 1, the unit binds and not memory."""
    item = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[counts.dtype]
    moved = sum(_moved(counts, role) for role in {loop.role for loop in counts.loops}) * item
    share = COPY * 1e9 * device.gigabytes_per_second / device.multiprocessors
    clocks = moved / share * 1e6 * device.clock_mhz  # of a multiprocessor, for an element of x
    shared = sum(
        sum(i.bits / 8 for i in loop.once.code if i.name in _SHARED) / loop.elements
        for loop in counts.loops
    )
    found = {
        "issue": counts.per_element() / 32 / rates.issue,
        "fp64": counts.per_element("fp64") / rates.fp64,
        "conversions": counts.per_element("conversions") / rates.conversions,
        "conversions64": counts.per_element("conversions64") / rates.conversions64,
        "conversions16": counts.per_element("conversions16") / rates.conversions16,
        "special": counts.per_element("special") / rates.special,
        "shared": shared / rates.shared_bytes,
    }
    return {unit: needed / clocks for unit, needed in found.items()}


def _moved(counts: Counts, role: str) -> int:
    """Tensors that the loops of this role read from global memory or write to it."""
    kernel = counts.kernel
    if role == "fetch" or (role == "sums" and not _from_chip(counts)):
        return kernel.read
    if role == "write":
        return 1 if _from_chip(counts) else kernel.read + 1
    return 0


def _from_chip(counts: Counts) -> bool:
    """Whether sums and results are computed from shared memory. A value at a time, a kernel on chip
    copies in the loop that adds up."""
    return any(loop.role == "fetch" for loop in counts.loops)
