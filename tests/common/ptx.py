"""The CUDA kernels as PTX, compiled by nvcc and kept in build/ptx/ until a source changes."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cuda_emulator.building import digest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "ptx"
SOURCES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
#: setup.py's and torch's, but for -lineinfo, which changes no instruction.
FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", "-DBNORM_EXT_CUDA=1"),
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"),
    "--expt-relaxed-constexpr",
]
JOBS = int(os.environ.get("MAX_JOBS") or 2)


@functools.cache
def nvcc() -> str | None:
    sys.path.insert(0, str(ROOT))
    import build_cuda

    toolkit = build_cuda.find_toolkit(os.environ)
    return None if isinstance(toolkit, str) else f"{toolkit.home}/bin/nvcc"


NO_NVCC = "no nvcc: CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda have none"


@functools.cache
def _key() -> str:
    """Of all that the PTX is made from, but system headers and the one source."""
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, check=True).stdout
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh")])
    parts = [version, torch.__version__.encode(), " ".join(FLAGS).encode()]
    return digest([*parts, *(path.read_bytes() for path in headers)])


def compiled(source: str, arch: int) -> Path:
    """The PTX of csrc/cuda/<source>.cu for compute_<arch>."""
    file = CSRC / "cuda" / f"{source}.cu"
    name = f"{source}.{arch}"
    target = FOLDER / f"{name}-{digest([_key().encode(), file.read_bytes()])}.ptx"
    if target.exists():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    torch_include = Path(torch.__file__).parent / "include"
    command = [str(nvcc()), "-ptx", f"-arch=compute_{arch}", *FLAGS, "-isystem", str(torch_include)]
    command += [str(file), "-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    temporary.replace(target)
    return target


def compile_all(sources: Iterable[str], archs: Sequence[int]) -> dict[tuple[str, int], Path]:
    jobs = [(source, arch) for arch in archs for source in sources]
    # The longest first.
    jobs.sort(key=lambda job: -(CSRC / "cuda" / f"{job[0]}.cu").stat().st_size)
    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True))


def folder_of(name: str, files: dict[tuple[str, int], Path]) -> Path:
    """A folder with these files only, for BNORM_EXT_EMULATED_PTX."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for (source, arch), file in files.items():
        shutil.copy(file, folder / f"{source}.{arch}.ptx")
    return folder
