"""SASS of the kernels' source files, compiled for one architecture."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from ..machine import ROOT

CSRC = ROOT / "csrc"
_CACHE = CSRC.parent / "build" / "static"
#: As the package is built (build_support.py), without what only debugging needs.
FLAGS = ("-std=c++17", "-O3", "-fmad=false")


class Missing(RuntimeError):
    """A tool that is not on this machine; the text says which and where it was looked for."""


def nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    for candidate in [*(f"{home}/bin/nvcc" for home in homes if home), on_path]:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise Missing("there is no nvcc (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH)")


def cuobjdump() -> str:
    """Of the toolkit, or the one in triton's wheel."""
    beside = Path(nvcc()).parent / "cuobjdump"
    if os.access(beside, os.X_OK):
        return str(beside)
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        found = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.exists():
            return str(found)
    raise Missing("there is no cuobjdump, neither in the CUDA toolkit nor in triton")


def tools() -> None:
    """Raises Missing where the kernels cannot be compiled and read."""
    if not (CSRC / "cuda").is_dir():
        raise Missing("the kernels' sources are not here: run it from a checkout")
    nvcc()
    cuobjdump()


def host_compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def listing(file: str, arch: int) -> str:
    """What cuobjdump prints of csrc/cuda/``file`` for sm_``arch``; compiled once per state of the
    sources, kept in build/static."""
    state = b"".join(p.read_bytes() for p in included(CSRC / "cuda" / file))
    key = hashlib.sha256(state + repr((file, arch, FLAGS)).encode()).hexdigest()[:16]
    kept = _CACHE / f"{Path(file).stem}-sm_{arch}-{key}.sass"
    if kept.exists():
        return kept.read_text()
    _CACHE.mkdir(parents=True, exist_ok=True)
    cubin = kept.with_suffix(".cubin")
    include = Path(torch.__file__).parent / "include"
    command = [nvcc(), *FLAGS, f"-arch=sm_{arch}", "-cubin", "-isystem", str(include)]
    subprocess.run([*command, str(CSRC / "cuda" / file), "-o", str(cubin)], check=True)
    text = disassembled(cubin)
    kept.write_text(text)
    cubin.unlink()
    return text


def disassembled(cubin: Path) -> str:
    """What cuobjdump prints of a compiled file: its machine code, and the registers it takes."""
    return "".join(
        subprocess.run(
            [cuobjdump(), option, cubin], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        for option in ("-sass", "-res-usage")
    )


def included(file: Path) -> list[Path]:
    """A source file and all files of the project that it includes, sorted."""
    found: set[Path] = set()
    waiting = [file.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found.add(path)
            names = _INCLUDE.findall(path.read_text())
            waiting += [(path.parent / name).resolve() for name in names]
    return sorted(found)


_INCLUDE = re.compile(r'^ *# *include "([^"]+)"', re.MULTILINE)
