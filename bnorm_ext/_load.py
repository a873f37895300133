"""Loads the compiled module, but only into the torch that it was compiled against.

`_build.py` says which one that was, and can be read when the compiled module cannot be loaded.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch

from ._version import __version__

#: BNORM_EXT_DISABLE=1: every call goes to torch's own operators, the compiled module is not needed.
DISABLED: bool = os.environ.get("BNORM_EXT_DISABLE", "0").strip() not in ("", "0")

INSTALL = "pip install --no-build-isolation ."
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


class BuildInfo(TypedDict):
    """What `build_info` returns."""

    version: str  #: of this package
    torch: str | None  #: the torch that it was compiled against; None: it was not compiled
    cuda: str | None  #: version of the CUDA toolkit; None: compiled without CUDA kernels
    cuda_kernels: bool  #: whether CUDA kernels are in
    cuda_left_out: str | None  #: why they are not
    archs: list[str]  #: the GPU architectures compiled for, as TORCH_CUDA_ARCH_LIST writes them
    compiler: str | None  #: name and version of the C++ compiler
    cpu_isas: list[str]  #: the instruction sets that CPU kernels were compiled for
    cpu_capability: str | None  #: the one chosen on this machine: 'baseline', 'avx2' or 'avx512'


def _submodule(name: str) -> ModuleType | None:
    """bnorm_ext.<name>, or None where there is no such file."""
    full = f"{__package__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None


def _not_built(what: str) -> ImportError:
    return ImportError(
        f"bnorm_ext is not compiled for this Python: {what} is missing from "
        f"{Path(__file__).parent}. In the folder of its setup.py, run:\n\n    {INSTALL}\n\n"
        "(If it is installed elsewhere, start Python outside of the source folder. To use torch's "
        "own batch norm without compiling, set BNORM_EXT_DISABLE=1.)"
    )


def load() -> ModuleType | None:
    """The compiled module `bnorm_ext._C`; None under BNORM_EXT_DISABLE=1.

    Raises ImportError where it is missing or was compiled against another torch.
    """
    if DISABLED:
        return None
    build = _submodule("_build")
    if build is None:
        raise _not_built("_build.py")
    running = str(torch.__version__)
    if running != build.TORCH:
        raise ImportError(
            f"bnorm_ext was compiled against torch {build.TORCH}, but torch {running} is now "
            "imported. A compiled extension runs only with its own torch. In the folder of its "
            f"setup.py, rebuild it:\n\n    {REBUILD}\n"
        )
    compiled = _submodule("_C")
    if compiled is None:
        raise _not_built("_C")
    return compiled


def build_info() -> BuildInfo:
    """How this copy was compiled, and what it chose on this machine.

    Works under BNORM_EXT_DISABLE=1 too; what was never compiled is None there.
    """
    compiled = load()
    build = _submodule("_build")
    cuda = getattr(build, "CUDA", None)
    return BuildInfo(
        version=__version__,
        torch=getattr(build, "TORCH", None),
        cuda=cuda,
        cuda_kernels=cuda is not None,
        cuda_left_out=getattr(build, "CUDA_LEFT_OUT", None),
        archs=list(getattr(build, "CUDA_ARCHS", ())),
        compiler=getattr(build, "COMPILER", None),
        cpu_isas=list(getattr(build, "CPU_ISAS", ())),
        cpu_capability=None if compiled is None else compiled.cpu_capability(),
    )
