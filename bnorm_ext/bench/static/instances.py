"""The counts of all instances of a kernel: one for each dtype, width of an access and mapping."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .compile import listing
from .kernels import Counts, Kernel, assumptions, counts_of, instance_of, without_epilogue
from .sass import Function, parse


def counts(kernel: Kernel, arch: int, act: str = "identity") -> list[Counts]:
    """Compiles the kernel's file where it has not been compiled yet."""
    return counts_in(_functions(kernel.file, arch), kernel, act)


def counts_in(functions: Sequence[Function], kernel: Kernel, act: str = "identity") -> list[Counts]:
    """Those that are among functions of one architecture."""
    assumed = assumptions(kernel, act)
    taken = _taken(functions, kernel, plain=act == "identity")
    found = (counts_of(function, kernel, assumed) for function in taken)
    return [c for c in found if c is not None]


def _taken(functions: Sequence[Function], kernel: Kernel, plain: bool) -> list[Function]:
    """The functions that calls take. ``plain``: those that are compiled without an epilogue, where
    there are such."""
    taken: dict[tuple[str, int, str], Function] = {}
    for function in functions:
        instance = instance_of(function, kernel)
        if instance is not None and (instance not in taken or without_epilogue(function) == plain):
            taken[instance] = function
    return list(taken.values())


@functools.cache
def _functions(file: str, arch: int) -> list[Function]:
    return parse(listing(file, arch))
