"""What setup.py decides about CUDA: in or out, for which GPUs, with which flags.

Plain functions without torch and setuptools, like those of build_support.py.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from build_support import BuildError, run_tool

# What is compiled where no list is given and no GPU is visible, as far as the toolkit knows it.
# Code for one GPU also runs on those of the same major version and a higher minor one: 8.0 on 8.6
# and 8.9, 10.0 on 10.3, 12.0 on 12.1. PTX is for the others, which compile it when they first load
# it: 8.7, as Tegra does not share the desktop's code, and what is newer than all of these.
DEFAULT_ARCHS = ("7.5", "8.0+PTX", "9.0+PTX", "10.0", "12.0")
ARM_ARCHS = ("11.0",)  # on chips with an aarch64 CPU only

# In the default these are assembled from the PTX of 9.0, which saves a run of the optimiser for
# each: the sources do not distinguish between them (they ask for no __CUDA_ARCH__ above 900). 12.0
# has PTX of its own: from that of 9.0, CUDA 13.0 spills registers in four of the kernels.
SHARED_PTX = (9, 0)
SHARING = ("10.0", "11.0")

OLDEST_ARCH = (7, 5)  # that the kernels are written for

# Where NVIDIA's installers link the toolkit; they do not put it on PATH.
USUAL_TOOLKIT = "/usr/local/cuda"


@dataclass(frozen=True)
class Toolkit:
    home: str
    version: str  # "13.0"
    archs: tuple[str, ...]  # what nvcc can compile for: ("7.5", "8.0", ...)


@dataclass(frozen=True)
class CudaPlan:
    toolkit: Toolkit | None  # None: CUDA is left out ...
    reason: str  # ... for this reason
    archs: tuple[str, ...] = ()  # in the form of TORCH_CUDA_ARCH_LIST
    chosen_by: str = ""  # what has chosen them

    def line(self) -> str:
        if self.toolkit is None:
            return f"CUDA kernels: {self.reason}"
        archs = " ".join(self.archs)
        return f"CUDA kernels: toolkit {self.toolkit.version}, for {archs} ({self.chosen_by})"


BY_LIST = "TORCH_CUDA_ARCH_LIST"
BY_GPUS = "the visible GPUs"
BY_DEFAULT = "the default, no GPU is visible"


def find_toolkit(
    environ: Mapping[str, str],
    which: Callable[[str], str | None] = shutil.which,
    run: Callable[..., str] = run_tool,
    usual: str = USUAL_TOOLKIT,
) -> Toolkit | str:
    """The toolkit of CUDA_HOME, CUDA_PATH, else of the nvcc on PATH, else in the usual folder; or
    why there is none. These are torch's own guesses, in its order."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else which("nvcc")
    if nvcc is None and os.path.exists(os.path.join(usual, "bin", "nvcc")):
        home, nvcc = usual, os.path.join(usual, "bin", "nvcc")
    if nvcc is None:
        return f"no nvcc was found through CUDA_HOME, CUDA_PATH, PATH or in {usual}"
    release = re.search(r"release (\d+\.\d+)", run(nvcc, "--version")) if which(nvcc) else None
    if release is None:
        return f"{nvcc} is not a working nvcc"
    if not home:
        # The nvcc on PATH may be a link or a wrapper script anywhere: it knows its own home.
        top = re.search(r"TOP=(.+)", run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
        home = top[1].strip() if top else os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
    listed = re.findall(r"compute_(\d+)(\d)\b", run(nvcc, "--list-gpu-arch"))
    archs = sorted((int(major), int(minor)) for major, minor in listed)
    return Toolkit(os.path.normpath(home), release[1], tuple(f"{a}.{b}" for a, b in archs))


# --- Which GPUs -----------------------------------------------------------------------------------


def number(arch: str) -> tuple[int, int]:
    """(8, 0) of "8.0+PTX"."""
    major, minor = arch.removesuffix("+PTX").split(".")
    return int(major), int(minor)


def visible_gpus(torch: Any) -> set[tuple[int, int]]:
    """Compute capabilities of the GPUs that torch sees; none where it cannot say."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return {tuple(torch.cuda.get_device_capability(i)) for i in range(count)}
    except (RuntimeError, AssertionError):  # a driver that is too old, or torch without CUDA
        return set()


def archs_of_gpus(gpus: Iterable[tuple[int, int]], toolkit: Toolkit) -> tuple[str, ...]:
    """The newest that the toolkit knows and that each GPU runs, if only by compiling its PTX."""
    known = [number(arch) for arch in toolkit.archs]
    usable = [[arch for arch in known if arch <= gpu] for gpu in gpus if gpu >= OLDEST_ARCH]
    best = {max(archs) for archs in usable if archs}
    return tuple(f"{major}.{minor}+PTX" for major, minor in sorted(best))


def default_archs(toolkit: Toolkit, machine: str = platform.machine()) -> tuple[str, ...]:
    wanted = DEFAULT_ARCHS
    if machine.lower() in ("aarch64", "arm64"):
        wanted = tuple(sorted(wanted + ARM_ARCHS, key=number))
    archs = tuple(arch for arch in wanted if arch.removesuffix("+PTX") in toolkit.archs)
    if not archs:
        raise BuildError(
            f"CUDA {toolkit.version} knows none of the GPUs that bnorm_ext is for "
            f"({' '.join(wanted)}). Set TORCH_CUDA_ARCH_LIST, or BNORM_EXT_CUDA=0 to build "
            "for the CPU only."
        )
    return archs


def choose_archs(
    environ: Mapping[str, str], toolkit: Toolkit, gpus: Callable[[], Iterable[tuple[int, int]]]
) -> tuple[tuple[str, ...], str]:
    """The architectures, and what has chosen them."""
    given = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if given:
        return tuple(given), BY_LIST
    if own := archs_of_gpus(gpus(), toolkit):
        return own, BY_GPUS
    return default_archs(toolkit), BY_DEFAULT


def plan_cuda(
    environ: Mapping[str, str],
    torch_version: str,
    torch_cuda: str | None,
    toolkit: Toolkit | str,
    has_kernels: bool,
    gpus: Callable[[], Iterable[tuple[int, int]]],
) -> CudaPlan:
    """Whether CUDA sources are compiled, which what is installed decides, never whether a GPU is
    visible; and for which GPUs."""
    wish = environ.get("BNORM_EXT_CUDA", "").strip().lower()
    if wish not in ("", "auto", "0", "1"):
        raise BuildError(f"BNORM_EXT_CUDA must be 0, 1 or unset, not {wish!r}.")
    if wish == "0":
        return CudaPlan(None, "left out (BNORM_EXT_CUDA=0)")

    reason = ""
    if torch_cuda is None:
        reason = f"left out (the installed torch {torch_version} is no CUDA build)"
    elif isinstance(toolkit, str):
        reason = f"left out ({toolkit})"
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"torch {torch_version} was built with CUDA {torch_cuda}, but the toolkit in "
            f"{toolkit.home} is CUDA {toolkit.version}. The major versions must agree: install "
            f"a CUDA {torch_cuda.split('.')[0]} toolkit and point CUDA_HOME to it, install a torch "
            f"built with CUDA {toolkit.version.split('.')[0]}, or set BNORM_EXT_CUDA=0 to build "
            "for the CPU only."
        )
    elif not has_kernels:
        reason = "none in this source tree"
    if reason:
        if wish == "1":
            raise BuildError(f"BNORM_EXT_CUDA=1 asks for CUDA kernels, but they are {reason}.")
        return CudaPlan(None, reason)

    assert isinstance(toolkit, Toolkit)
    return CudaPlan(toolkit, "", *choose_archs(environ, toolkit, gpus))


# --- nvcc's flags ---------------------------------------------------------------------------------


def arch_flags(plan: CudaPlan, of_list: Callable[[], list[str]]) -> list[str]:
    """-gencode flags. of_list: torch's own, for TORCH_CUDA_ARCH_LIST, which also knows names.

    They are always given: BuildExtension adds none where any flag contains "arch", and the folder
    of torch's headers may (/home/me/research).
    """
    if plan.chosen_by == BY_LIST:
        return of_list()
    assert plan.toolkit is not None
    shares = plan.chosen_by == BY_DEFAULT and "9.0" in plan.toolkit.archs
    flags = []
    for arch in plan.archs:
        virtual = SHARED_PTX if shares and arch in SHARING else number(arch)
        compute, real = ("{}{}".format(*pair) for pair in (virtual, number(arch)))
        flags.append(f"-gencode=arch=compute_{compute},code=sm_{real}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{compute},code=compute_{compute}")
    return flags


def nvcc_flags(
    environ: Mapping[str, str], toolkit: Toolkit, archs: int, jobs: int, files: int
) -> list[str]:
    """Flags for all kernels, apart from includes and architectures.

    jobs: processes that may run at once; files: CUDA sources that there are to compile.
    """
    flags = ["-O3", "-fmad=false", "-DNDEBUG", "-Xfatbin=-compress-all"]
    if tuple(int(part) for part in toolkit.version.split(".")) >= (13, 0):
        flags.append("--compress-mode=size")
    # Line numbers for profilers and sanitizers.
    if environ.get("BNORM_EXT_LINEINFO") == "1":
        flags.append("-lineinfo")
    host = "-Wall,-Wextra,-ffp-contract=off,-fvisibility=hidden"
    if environ.get("BNORM_EXT_WERROR") == "1":
        flags.append("-Werror=all-warnings")
        host += ",-Werror"
    # Where there are more processes than files each compiles for several GPUs at once.
    threads = max(1, min(archs, jobs // max(1, files)))
    return [*flags, f"--threads={threads}", f"-Xcompiler={host}"]
