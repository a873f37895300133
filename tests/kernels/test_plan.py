"""csrc/cuda/plan.h and tile_iterator.cuh: every element of a tensor belongs to one thread, once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def check_plans(
    csrc: Path, folder: Path, name: str = "check_plan"
) -> subprocess.CompletedProcess[str]:
    """Compiles a program of tests/kernels/plan/ against these sources and runs it."""
    here = Path(__file__).resolve().parent / "plan"
    program = folder / name
    include = Path(torch.__file__).parent / "include"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-DBNORM_EXT_EMULATOR=1", f"-I{here}", f"-I{csrc}/cuda"]
    command += ["-isystem", str(include), str(here / f"{name}.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)


def test_plans_cover_every_tensor(tmp_path: Path) -> None:
    done = check_plans(Path(os.environ.get("BNORM_EXT_CSRC", ROOT / "csrc")), tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 10000
