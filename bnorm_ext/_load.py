"""Loading the compiled module, after checking that it was compiled against the running torch.

The build writes the version into `_build.py`, which is readable even if the compiled module cannot
be loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch

from ._library import flaw
from ._version import __version__

#: Whether the environment sets BNORM_EXT_DISABLE=1. Then every call goes to torch's own operators
#: and the compiled module is not needed.
DISABLED: bool = os.environ.get("BNORM_EXT_DISABLE", "0").strip() not in ("", "0")

_FOLDER = Path(__file__).parent
INSTALL = "pip install --no-build-isolation ."
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


class BuildInfo(TypedDict):
    """What :func:`build_info` returns."""

    version: str  #: version of this package
    torch: str | None  #: version of torch that it was compiled against; None: not compiled
    cuda: str | None  #: version of the CUDA toolkit; None: compiled without CUDA kernels
    cuda_kernels: bool  #: whether the CUDA kernels were compiled
    cuda_left_out: str | None  #: why they were not; None: they were
    archs: list[str]  #: GPU architectures compiled for, in the form of TORCH_CUDA_ARCH_LIST
    archs_from: str | None  #: what chose them: that variable, the visible GPUs, or the default
    compiler: str | None  #: name and version of the C++ compiler
    cpu_isas: list[str]  #: instruction sets that the CPU kernels were compiled for
    cpu_capability: str | None  #: the one in use on this machine: 'baseline', 'avx2' or 'avx512'


def _submodule(name: str) -> ModuleType | None:
    """The module bnorm_ext.<name>, or None if there is no such file."""
    full = f"{__package__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None


def _not_built(what: str) -> ImportError:
    return ImportError(
        f"bnorm_ext is not compiled for this Python: {what} is missing from {_FOLDER}"
        f"{_of_other_pythons()}. In the folder of its setup.py, run:\n\n    {INSTALL}\n\n"
        "(If it is installed elsewhere, start Python outside of the source folder. To use torch's "
        "own batch norm without compiling, set BNORM_EXT_DISABLE=1.)"
    )


def _of_other_pythons() -> str:
    found = sorted(path.name for path in _FOLDER.glob("_C.*"))
    return f", which has {' and '.join(found)} of another Python" if found else ""


def _cannot_be_loaded(what: object, reason: object) -> ImportError:
    return ImportError(
        f"bnorm_ext cannot load {what}: {reason}. It was damaged after it was compiled, or "
        "compiled for another Python, torch or machine. In the folder of its setup.py, compile it "
        f"again:\n\n    {REBUILD}\n\n"
        "(To use torch's own batch norm without it, set BNORM_EXT_DISABLE=1.)"
    )


def _record() -> ModuleType | None:
    """`_build.py`, or None if there is no such file."""
    try:
        build = _submodule("_build")
    except Exception as error:
        raise _cannot_be_loaded(_FOLDER / "_build.py", error) from error
    if build is not None and not hasattr(build, "TORCH"):
        raise _cannot_be_loaded(_FOLDER / "_build.py", "it names no version of torch")
    return build


def _module() -> ModuleType:
    name = f"{__package__}._C"
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise _not_built("_C")
    path = Path(spec.origin or "_C")
    if path.is_file() and (wrong := flaw(path)):
        raise _cannot_be_loaded(path, wrong)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _cannot_be_loaded(path, error) from error


def load() -> ModuleType | None:
    """Imports the compiled module `bnorm_ext._C`.

    Returns:
        The module; None under BNORM_EXT_DISABLE=1.

    Raises:
        ImportError: it is missing or damaged, or was compiled against another torch or Python.
    """
    if DISABLED:
        return None
    build = _record()
    if build is None:
        raise _not_built("_build.py")
    running = str(torch.__version__)
    if running != build.TORCH:
        raise ImportError(
            f"bnorm_ext was compiled against torch {build.TORCH}, but torch {running} is now "
            "imported. A compiled extension runs only with its own torch. In the folder of its "
            f"setup.py, rebuild it:\n\n    {REBUILD}\n"
        )
    return _module()


def build_info() -> BuildInfo:
    """How this copy was compiled, and which instruction set it uses on this machine.

    Under BNORM_EXT_DISABLE=1 it works too; entries that only the compiled module knows are None.

    Returns:
        A dictionary with the entries of ``BuildInfo``: versions of this package, of torch and of
        CUDA, the compiler, the GPU architectures, and the instruction sets of the CPU kernels.
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
        archs_from=getattr(build, "CUDA_ARCHS_FROM", None),
        compiler=getattr(build, "COMPILER", None),
        cpu_isas=list(getattr(build, "CPU_ISAS", ())),
        cpu_capability=None if compiled is None else compiled.cpu_capability(),
    )


_warned = os.environ.get("BNORM_EXT_WARN", "1").strip() == "0"
_warned_of_code = _warned


def warn_without_cuda_kernels() -> None:
    """Says once that this build leaves CUDA tensors to torch, and how to change it.

    Called where such a tensor takes native's path. Silent under BNORM_EXT_WARN=0 and where it is
    meant: under BNORM_EXT_DISABLE=1, and with a torch for GPUs that have no kernels here (ROCm).
    """
    global _warned
    if _warned or DISABLED or torch.version.cuda is None:
        return
    _warned = True
    reason = getattr(_submodule("_build"), "CUDA_LEFT_OUT", None) or "left out"
    warnings.warn(
        f"bnorm_ext was compiled without CUDA kernels, {reason}: torch's own batch norm runs on "
        f"the GPU. To compile them, with a CUDA {torch.version.cuda.split('.')[0]} toolkit, in the "
        f"folder of its setup.py:\n\n    BNORM_EXT_CUDA=1 {REBUILD}\n\n"
        "(BNORM_EXT_WARN=0 silences this.)",
        stacklevel=4,  # past this function, its caller and batch_norm
    )


def warn_without_code(gpu: str, capability: tuple[int, int]) -> None:
    """Says once that the CUDA kernels are compiled for other GPUs than this one.

    Called where its first tensor takes native's path. Silent under BNORM_EXT_WARN=0.
    """
    global _warned_of_code
    if _warned_of_code:
        return
    _warned_of_code = True
    major, minor = capability
    archs = ", ".join(build_info()["archs"]) or "none"
    warnings.warn(
        f"bnorm_ext was compiled for GPUs of compute capability {archs}, but this one ({gpu}) has "
        f"{major}.{minor}: torch's own batch norm runs on it. From 7.5 on, kernels for it can be "
        "compiled; in the folder of bnorm_ext's setup.py:\n\n    "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} BNORM_EXT_CUDA=1 {REBUILD}\n\n"
        "(BNORM_EXT_WARN=0 silences this.)",
        stacklevel=6,  # past this function, those that asked, and batch_norm
    )
