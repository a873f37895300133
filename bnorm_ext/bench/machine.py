"""The conditions of a measurement besides the code: versions, hardware, memory and caches."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnorm_ext

#: The folder that contains bnorm_ext: a checkout, or the installed packages.
ROOT = Path(bnorm_ext.__file__).resolve().parent.parent
FRESH_BYTES = 4 << 20  # in a cold run, outputs of at least this size are fresh memory
MADV_HUGEPAGE = 14  # Linux's mman.h
# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
_IS_MMAPPED = 2
VARIABLES = ("BNORM_EXT_", "OMP_", "MKL_", "KMP_", "GOMP_", "GLIBC_TUNABLES", "MALLOC_", "CUDA_",
             "PYTORCH_", "TORCH", "LD_PRELOAD")  # fmt: skip


@functools.cache
def _libc() -> Any:
    """glibc; None if the C library is another one."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def fresh_outputs(fresh: bool) -> bool:
    """Sets for the whole process whether large blocks are fresh memory of the system each time
    (True) or freed blocks are reused (False). By default glibc does either, depending on the order
    of calls.

    Returns:
        Whether the C library could be set.
    """
    libc = _libc()
    if libc is None:
        return False
    told = libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # small blocks are always reused
    if not fresh:
        return bool(told and libc.mallopt(M_MMAP_MAX, 0))
    told = told and libc.mallopt(M_MMAP_THRESHOLD, FRESH_BYTES)
    return bool(told and libc.mallopt(M_MMAP_MAX, 1 << 16))


@contextlib.contextmanager
def no_large_holes() -> Iterator[None]:
    """A context in which blocks of FRESH_BYTES and more are certain to be fresh memory.

    malloc would first reuse free blocks in its heap. They are allocated here and held meanwhile.
    """
    libc, held = _libc(), []
    if libc is not None:
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        for _ in range(1 << 14):
            block = libc.malloc(FRESH_BYTES)
            if not block:
                break
            held.append(block)
            # In front of a block glibc keeps its size, with a flag for memory of its own from the
            # system. Then the heap, wherever its parts are, has no such block left.
            size = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t))
            if size.value & _IS_MMAPPED:
                break
    try:
        yield
    finally:
        for block in held:
            libc.free(block)


def in_huge_pages(out: Tensor) -> Tensor:
    """Asks for huge pages for memory that is not yet written, as bnorm_ext does for outputs."""
    libc = _libc() if sys.platform == "linux" else None
    if libc is not None and out.nbytes >= FRESH_BYTES:
        huge = 2 << 20
        first, last = -(-out.data_ptr() // huge), (out.data_ptr() + out.nbytes) // huge
        if last >= first + 2:
            size = ctypes.c_size_t((last - first) * huge)
            libc.madvise(ctypes.c_void_p(first * huge), size, MADV_HUGEPAGE)
    return out


def _cache_bytes() -> int:
    """The size of the largest cache of the first core; 32 MB if the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def cpu_flush_bytes() -> int:
    """The size of the buffer that is written before a cold call to flush the caches."""
    return min(max(2 * _cache_bytes(), 16 << 20), 256 << 20)


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """Memory that tensors may take; on the CPU within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo") or "")
    found = [int(free[1]) << 10 if free else _physical_bytes()]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _text(file) or ""
        found += [int(limit)] if limit.isdigit() else []
    return min(found)


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raises ValueError if that many bytes would not fit into memory."""
    there = free_bytes(device)
    if needed > 0.8 * there:
        raise ValueError(
            f"{what}: needs about {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are free"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is exhausted. torch has an exception type for GPUs only;
    on the CPU the text decides."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit of the checkout that is measured; None for an installed package, even if the
    environment that contains it is inside of some checkout."""
    if _output("git", "rev-parse", "--show-toplevel") != str(ROOT):
        return None
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    # Results that were just recorded do not change what is measured.
    code = ("--", ":(exclude)bench/results")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", *code)
    return f"{head}, with changes" if head and changed else head


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": _cache_bytes(),
        "memory_bytes": _physical_bytes(),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            query: _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        }
    return found


def header(device: torch.device, command: str, arguments: list[str]) -> dict[str, Any]:
    """The header of results, the same for every program: versions, commit, date, command and
    machine. `command` is how the program was started."""
    info = bnorm_ext.build_info()
    return {
        "versions": {
            "bnorm_ext": bnorm_ext.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            "compiler": info["compiler"],
            "cpu_capability": info["cpu_capability"],
            "cuda_archs": info["archs"],
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*command.split(), *arguments]),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": _hardware(device),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            # Values with paths are left out: they do not matter for speed and may be private.
            if name.startswith(VARIABLES) and "/" not in value
        },
    }
