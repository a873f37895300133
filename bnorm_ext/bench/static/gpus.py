"""Rates of GPUs, from data sheets and the CUDA programming guide. Measured is only the H200, by
bench/terms.cu (bench/results/cuda-terms.json): FP64 64, conversions from and to double 15, others
63 to 64 per clock and multiprocessor, and a copy of 4.2 TB/s of large tensors."""

from __future__ import annotations

from typing import NamedTuple

from bnorm_ext.explain import resolve_device


class Rates(NamedTuple):
    """Per multiprocessor and clock, by compute capability: instructions that its four schedulers
    start, in warps; results of the units, in threads; bytes of shared memory.

    Source: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (results per
    clock and multiprocessor) and the sections on each compute capability.
    """

    issue: int  # warps
    fp32: int
    fp64: int
    conversions: int  # but those from and to 64 bits
    conversions64: int
    special: int
    conversions16: int = 64  # float32 from and to 16 bits; assumed elsewhere than on an H200
    shared_bytes: int = 128
    threads: int = 2048  # resident at most
    registers: int = 65536


RATES = {
    (7, 5): Rates(4, 64, 2, 16, 2, 16, threads=1024),
    (8, 0): Rates(4, 64, 32, 16, 16, 16),
    (8, 6): Rates(4, 128, 2, 16, 2, 16, threads=1536),
    (8, 9): Rates(4, 128, 2, 16, 2, 16, threads=1536),
    (9, 0): Rates(4, 128, 64, 64, 16, 16),
    (10, 0): Rates(4, 128, 64, 64, 16, 16),
    (10, 3): Rates(4, 128, 2, 64, 2, 16),
    (12, 0): Rates(4, 128, 2, 16, 2, 16, threads=1536),
}


class Memory(NamedTuple):
    """Source: the vendor's data sheet of the GPU."""

    bandwidth: float  # bytes/s, of the data sheet
    clock: float  # Hz, boost


MEMORY = {
    "T4": Memory(320e9, 1.590e9),
    "A10": Memory(600e9, 1.695e9),
    "A100": Memory(2039e9, 1.410e9),
    "RTX 3090": Memory(936e9, 1.695e9),
    "L4": Memory(300e9, 2.040e9),
    "L40S": Memory(864e9, 2.520e9),
    "RTX 4090": Memory(1008e9, 2.520e9),
    "H100": Memory(3350e9, 1.980e9),
    "H200": Memory(4800e9, 1.980e9),
    "GH200": Memory(4000e9, 1.980e9),
    "B200": Memory(8000e9, 1.965e9),
    "B300": Memory(8000e9, 1.920e9),
    "RTX 5090": Memory(1792e9, 2.407e9),
}

#: Share of the data sheet's bandwidth that a plain copy of a large tensor reaches. Measured on
#: an H200 (4.2 of 4.8 TB/s), assumed for all others: predictions are quoted as shares of this
#: copy, in which it cancels where bytes bind.
COPY = 0.875


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    rates: Rates
    memory: Memory

    @property
    def compiled_for(self) -> int:
        """The architecture whose machine code runs on it, of those that are read."""
        major, minor = self.capability
        return 100 if major == 10 else 10 * major + minor

    @property
    def copy(self) -> float:
        """Bytes a second of a plain copy."""
        return COPY * self.memory.bandwidth


def gpu(name: str) -> Gpu:
    """Raises ValueError for a GPU without figures."""
    known = resolve_device(name)
    if known.name not in MEMORY:
        raise ValueError(f"no rates of {known.name}; known are {', '.join(MEMORY)}")
    return Gpu(
        known.name,
        known.capability,
        known.multiprocessors,
        known.l2_bytes,
        RATES[known.capability],
        MEMORY[known.name],
    )
