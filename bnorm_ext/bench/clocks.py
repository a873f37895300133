"""Clocks of a GPU during a measurement, and why they were lowered, as NVML tells them.

NVML is the driver's own library (what nvidia-smi calls), so it is there wherever CUDA is, except in
some containers. Without it nothing is recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import threading
from collections.abc import Iterator
from typing import Any

import torch

# nvml.h: nvmlClockType_t, and the bits of nvmlClocksEventReasons that lower a clock.
_SM, _MEMORY = 1, 2
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


def _library() -> Any:
    """NVML; OSError where the machine has none."""
    return ctypes.CDLL("libnvidia-ml.so.1")


class Clocks:
    """Samples of one GPU. Taken while it works: an idle GPU lowers its clocks."""

    def __init__(self, uuid: str) -> None:
        """Raises OSError where NVML or this GPU is not to be had."""
        self._nvml = _library()
        self._gpu = ctypes.c_void_p()
        self.mhz: dict[str, list[int]] = {"sm_mhz": [], "memory_mhz": []}
        self.reasons: dict[str, int] = {}  #: in how many samples each reason held
        self.samples = 0
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(
            name.encode(), ctypes.byref(self._gpu)
        ):
            raise OSError(f"NVML does not know {name}")

    def sample(self) -> None:
        value, bits = ctypes.c_uint(), ctypes.c_ulonglong()
        for name, kind in (("sm_mhz", _SM), ("memory_mhz", _MEMORY)):
            if not self._nvml.nvmlDeviceGetClockInfo(self._gpu, kind, ctypes.byref(value)):
                self.mhz[name].append(value.value)
        # The older name, which every driver exports.
        ask = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        if not ask(self._gpu, ctypes.byref(bits)):
            for bit, reason in _REASONS.items():
                if bits.value & bit:
                    self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.samples += 1

    def summary(self) -> dict[str, Any]:
        """Lowest, median and highest MHz, and the share of samples in which a reason held."""
        found: dict[str, Any] = {"samples": self.samples}
        for name, values in self.mhz.items():
            if values:
                found[name] = [min(values), statistics.median(values), max(values)]
        found["throttled"] = {r: round(n / self.samples, 3) for r, n in self.reasons.items()}
        return found


@functools.cache
def clocks_of(device: torch.device) -> Clocks | None:
    """The samples of a GPU, the same object for the whole run; None without NVML."""
    if device.type != "cuda":
        return None
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: no uuid, another NVML
        return Clocks(str(torch.cuda.get_device_properties(device).uuid))
    return None


EVERY = 0.5  # seconds between the samples of `sampling`


@contextlib.contextmanager
def sampling(device: torch.device) -> Iterator[None]:
    """Samples from another thread, for programs that wait for the device after each step."""
    found = clocks_of(device)
    if found is None:
        yield
        return
    over = threading.Event()

    def run() -> None:
        while not over.wait(EVERY):
            found.sample()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def record(header: dict[str, Any], device: torch.device) -> None:
    """Writes the clocks of the run into the header of its results."""
    found = clocks_of(device)
    if found is not None:
        header["machine"]["gpu"]["clocks"] = found.summary()


def sentence(header: dict[str, Any]) -> str:
    """The clocks in a header as a line; empty if there are none."""
    found = header.get("machine", {}).get("gpu", {}).get("clocks")
    if not found or not found["samples"]:
        return ""
    parts = [
        f"{name} {found[key][1]:g} MHz ({found[key][0]} to {found[key][2]})"
        for name, key in (("SM", "sm_mhz"), ("memory", "memory_mhz"))
        if key in found
    ]
    why = [f"{reason} in {100 * share:.0f} %" for reason, share in found["throttled"].items()]
    lowered = f"; lowered by {', '.join(why)} of {found['samples']} samples" if why else ""
    return f"clocks while measuring: {', '.join(parts)}{lowered}"
