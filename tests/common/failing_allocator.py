"""Out of memory in the middle of a call: allocations of CPU tensors that fail one after the other.

``refused(k)`` lets allocation number k inside fail with torch's own error; ``every(call)`` does so
for each k that there is. It counts the tensors' memory and what this package's kernels need beside
it, which comes from the same allocator. Small objects of C++ and Python are not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cuda_emulator import building
from tests.common import torch_headers

SOURCE = Path(__file__).with_suffix(".cpp")
TEXT = "DefaultCPUAllocator"  # in torch's error


@functools.cache
def library() -> Any:
    """Compiled at the first use, and kept until its source changes."""
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", *torch_headers.flags()]
    compiled = building.compile_object(SOURCE, flags, [])

    def link_to(temporary: Path) -> None:
        linked = ["-shared", str(compiled), "-o", str(temporary)]
        done = building.run_compiler([*linked, *torch_headers.libraries("c10")])
        if done.returncode:
            raise RuntimeError(done.stderr)

    loaded = ctypes.CDLL(str(building.made(compiled.with_suffix(".so"), link_to)))
    loaded.arm.argtypes = [ctypes.c_int64, ctypes.c_bool]
    loaded.arm.restype = None
    loaded.disarm.restype = loaded.alive.restype = ctypes.c_int64
    return loaded


def alive() -> int:
    """Blocks that were allocated inside of `refused` and that nobody has freed."""
    count: int = library().alive()
    return count


def _falls_to(count: int) -> bool:
    """Whether no more blocks than these are left. Other threads, such as those of a process group,
    may let go of theirs a moment later."""
    for _ in range(100):
        if alive() <= count:
            return True
        gc.collect()
        time.sleep(0.05)
    return False


class Counted:
    allocations = 0  #: inside, after the end


@contextlib.contextmanager
def refused(first: int, *, rest: bool = False) -> Iterator[Counted]:
    """Allocation number `first` inside fails, with `rest` all after it too. -1: none."""
    counted = Counted()
    library().arm(first, rest)
    try:
        yield counted
    finally:
        counted.allocations = library().disarm()


def every(
    make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]], *, at_least: int
) -> list[str]:
    """Makes a call once for each of its allocations, which fails then. Returns what was raised.

    make: fresh arguments each time; returns the call, and a function that says in bytes what the
    call must not have changed. The call that raises has changed nothing and kept nothing.
    at_least: allocations that there have to be, so that the test tests something.
    """
    call, _ = make()
    with refused(-1) as counted:
        call()
    assert counted.allocations >= at_least, counted.allocations
    del call
    texts = []
    for rest in (False, True):
        for k in range(counted.allocations):
            call, state = make()
            before = state()
            lived = alive()
            with refused(k, rest=rest), pytest.raises(RuntimeError, match=TEXT) as raised:
                call()
            assert state() == before, f"allocation {k} of {counted.allocations}"
            texts.append(str(raised.value))
            del raised, call, state
            assert _falls_to(lived), f"allocation {k}: {alive() - lived} blocks are left"
    return texts
