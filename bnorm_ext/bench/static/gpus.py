"""Rates of the units of a multiprocessor, from the CUDA programming guide. Measured is only the
H200, by bench/terms.cu (bench/results/cuda-terms.json): FP64 64, conversions from and to double 15,
others 63 to 64 per clock and multiprocessor."""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Per multiprocessor and clock, by compute capability: instructions that its four schedulers
    start, in warps; results of the units, in threads; bytes of shared memory.

    Source: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (results per
    clock and multiprocessor) and the sections on each compute capability.
    """

    issue: int  # warps
    fp64: int
    conversions: int  # but those from and to 64 bits
    conversions64: int
    special: int
    conversions16: int = 64  # float32 from and to 16 bits; assumed elsewhere than on an H200
    shared_bytes: int = 128


RATES = {
    (7, 5): Rates(4, 2, 16, 2, 16),
    (8, 0): Rates(4, 32, 16, 16, 16),
    (8, 6): Rates(4, 2, 16, 2, 16),
    (8, 9): Rates(4, 2, 16, 2, 16),
    (9, 0): Rates(4, 64, 64, 16, 16),
    (10, 0): Rates(4, 64, 64, 16, 16),
    (10, 3): Rates(4, 2, 64, 2, 16),
    (12, 0): Rates(4, 2, 16, 2, 16),
}
