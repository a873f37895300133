"""The modules of the build, imported from the source tree, and an nvcc that only answers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "build_support.py").exists():
    pytest.skip("the tests of the build need its source tree", allow_module_level=True)


def _import(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


support = _import("build_support")
cuda = _import("build_cuda")

ARCHS = ("7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
CUDA_13 = cuda.Toolkit("/opt/cuda", "13.0", ARCHS)
CUDA_126 = cuda.Toolkit("/opt/cuda", "12.6", ("5.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0"))


def cuda_plan(
    environ: dict[str, str] | None = None,
    torch_cuda: str | None = "13.0",
    toolkit: object = CUDA_13,
    has_kernels: bool = True,
    gpus: Iterable[tuple[int, int]] = (),
):
    return cuda.plan_cuda(environ or {}, "2.99.0", torch_cuda, toolkit, has_kernels, lambda: gpus)


def fake_nvcc(folder: Path, release: str = "12.8", top: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\n'
        "--list-gpu-arch) echo compute_80; echo compute_75; echo compute_120 ;;\n"
        f"--dryrun) echo '#$ TOP={top or folder.parent}/bin/..' >&2 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc
