"""What host code sees in a session of the emulator: streams, captures, pools, CUDA's runtime."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common import emulated


def library() -> Any:
    loaded = emulated.library()
    loaded.runner_end_capture.restype = ctypes.c_void_p
    loaded.runner_destroy_graph.argtypes = [ctypes.c_void_p]
    loaded.runner_pool_blocks.restype = ctypes.c_char_p
    loaded.runner_calls.restype = ctypes.c_char_p
    loaded.runner_has_code.restype = ctypes.c_int
    loaded.runner_words.restype = ctypes.c_void_p
    loaded.runner_words.argtypes = [ctypes.c_int64, ctypes.c_bool]
    return loaded


@contextlib.contextmanager
def on_stream(number: int) -> Iterator[None]:
    """Calls are on this stream; 0 is the one that a session begins on."""
    library().runner_stream(number)
    try:
        yield
    finally:
        library().runner_stream(0)


class Graph:
    """Of one capture. It cannot be replayed: captured launches run at once."""

    def __init__(self) -> None:
        self._graph: int | None = None

    def destroy(self) -> None:
        library().runner_destroy_graph(self._graph)


@contextlib.contextmanager
def capture(number: int = 0, also: Iterable[int] = ()) -> Iterator[Graph]:
    """Captures what is called on this stream, and on those in `also`."""
    graph = Graph()
    with on_stream(number):
        library().runner_begin_capture()
        for other in also:
            library().runner_capture_also(other)
        yield graph
        library().runner_stream(number)
        graph._graph = library().runner_end_capture()


def words(count: int, *, phases: bool = False) -> range:
    """The addresses of the semaphores that a launch which needs so many would get now."""
    begin = library().runner_words(count, phases)
    return range(begin, begin + 4 * count)


def disjoint(*ranges: range) -> bool:
    found = sorted(ranges, key=lambda r: r.start)
    return all(a.stop <= b.start for a, b in itertools.pairwise(found))


class Pool:
    """A graph's memory pool, as torch's graph trees use it."""

    def check(self, outputs: Iterable[Tensor]) -> None:
        """As `check_memory_pool` there: what lives in the pool is the outputs and nothing else."""
        living = {int(line, 16) for line in library().runner_pool_blocks().decode().split()}
        known = {t.untyped_storage().data_ptr() for t in outputs if t.numel() > 0}
        assert known <= living, "these outputs are not in the pool"
        assert living == known, "these live in the pool and are no outputs of the graph"


@contextlib.contextmanager
def pool() -> Iterator[Pool]:
    """Torch allocates from a graph's pool."""
    library().runner_pool(True)
    try:
        yield Pool()
    finally:
        library().runner_pool(False)


def calls() -> list[str]:
    """What host code has asked the runtime in this session, and the attributes that it has set."""
    text: str = library().runner_calls().decode()
    return text.splitlines()


class Operations(TorchDispatchMode):
    """The names of the torch operations inside, those that C++ calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(f))
        return f(*args, **(kwargs or {}))
