"""The build: torch's BuildExtension, and the CPU kernels once per instruction set beside it.

Everything that can be said without code stands in pyproject.toml; what is decided here is decided
by functions of build_support.py and build_cuda.py. Environment variables: BNORM_EXT_CUDA,
BNORM_EXT_LINEINFO, BNORM_EXT_WERROR, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX (README.md).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not run in this folder's name

import build_cuda  # noqa: E402
import build_support as support  # noqa: E402

HEADERS = ("csrc/**/*.h", "csrc/**/*.inc", "csrc/**/*.cuh")

COMMON_FLAGS = [
    "-O3",
    "-g0",  # some Pythons hand their own -g on, which makes objects of torch's headers huge
    "-DNDEBUG",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # fused multiply-adds are written out where they are meant
    "-Wall",
    "-Wextra",
]
if os.environ.get("BNORM_EXT_WERROR") == "1":
    COMMON_FLAGS.append("-Werror")


def sources(*patterns: str) -> list[str]:
    """Paths relative to setup.py, as setuptools wants them."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def as_system(folders: list[str]) -> list[str]:
    return [flag for folder in folders for flag in ("-isystem", folder)]


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        if error.name != "torch":
            raise  # torch is there and broken: its own message says more
        raise support.BuildError(support.missing_torch_message(sys.executable)) from None
    support.check_versions(torch.__version__, setuptools.__version__)
    return torch


def find_tools() -> None:
    """Errors that a compiler would report less kindly, and ninja where PATH lacks it."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise support.BuildError(
            f"{header} is missing. Install Python's headers (Debian, Ubuntu: apt install "
            "python3-dev; Fedora: dnf install python3-devel)."
        )
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise support.BuildError(
            f"no C++ compiler: {compiler!r} was not found (Debian, Ubuntu: apt install g++; "
            "or set CXX)."
        )
    # `.venv/bin/python -m pip` does not put .venv/bin on PATH, where BuildExtension wants ninja.
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])


def configure() -> dict[str, Any]:
    """The extension and the command that builds it, for the torch that is installed."""
    torch = import_torch()
    find_tools()
    cuda_sources = sources("csrc/cuda/*.cu")
    plan = build_cuda.plan_cuda(
        os.environ,
        torch.__version__,
        torch.version.cuda,
        build_cuda.find_toolkit(os.environ),
        bool(cuda_sources),
        lambda: build_cuda.visible_gpus(torch),
    )
    print(f"bnorm_ext: torch {torch.__version__}; {plan.line()}", flush=True)
    jobs = support.max_jobs(
        os.environ, support.usable_memory(), support.usable_cores(), plan.toolkit is not None
    )
    os.environ["MAX_JOBS"] = str(jobs)  # BuildExtension's own default is all cores and two more

    from torch.utils import cpp_extension

    torch_includes = cpp_extension.include_paths()
    # -isystem instead of CppExtension's -I: -Wall is for our code, not for torch's headers.
    system_of_kernels = as_system(torch_includes)
    isas = support.isa_flags()
    define = ["-DBNORM_EXT_X86_KERNELS=1"] if "avx2" in isas else []
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    files = [name for name in files if not name.startswith("csrc/cpu/kernels_")]
    make_extension = cpp_extension.CppExtension
    nvcc: list[str] = []
    if plan.toolkit is not None:
        # The module has looked for a toolkit at import, by guesses that a wrapper script defeats.
        cpp_extension.CUDA_HOME = plan.toolkit.home
        nvcc = build_cuda.nvcc_flags(
            os.environ, plan.toolkit, len(plan.archs), jobs, len(cuda_sources)
        )
        nvcc += build_cuda.arch_flags(plan, cpp_extension._get_cuda_arch_flags)
        torch_includes = cpp_extension.include_paths("cuda")
        make_extension = cpp_extension.CUDAExtension
        files += cuda_sources + sources("csrc/cuda/*.cpp")
        define.append("-DBNORM_EXT_CUDA=1")

    system = as_system(torch_includes)
    compiler = cpp_extension.get_cxx_compiler()
    # ATen's headers have no threads without -fopenmp. It is not given to the linker: torch has
    # brought its own OpenMP runtime into the process, and a second one must not join it.
    openmp = []
    if sys.platform == "linux":
        openmp, line = support.openmp_flags(compiler_name(compiler), torchs_symbols(torch))
        if line:
            print(f"bnorm_ext: {line}", flush=True)
    extension = make_extension(
        "bnorm_ext._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=sources(*HEADERS),
        extra_compile_args={
            "cxx": [*COMMON_FLAGS, *openmp, *define, *system],
            "nvcc": [*nvcc, *define, *system],
        },
    )
    extension.include_dirs = [d for d in extension.include_dirs if d not in torch_includes]

    facts = {
        "TORCH": str(torch.__version__),
        "CUDA": plan.toolkit and plan.toolkit.version,
        "CUDA_LEFT_OUT": plan.reason or None,
        "CUDA_ARCHS": plan.archs,
        "CUDA_ARCHS_FROM": plan.chosen_by or None,
        "COMPILER": compiler_name(compiler),
        "CPU_ISAS": tuple(isas),
    }

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # `pip install -e` would compile in a temporary folder and so always everything. One
            # folder per torch: ninja does not look at headers that came by -isystem. Builds with
            # and without CUDA have their own too, so that each finds its objects again; those of
            # the CPU kernels are the same.
            tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.kernels_temp = ROOT / "build" / f"temp-{tag}"
            self.build_temp = f"{self.kernels_temp}{'-cuda' if plan.toolkit is not None else ''}"

        def build_extensions(self) -> None:
            self.extensions[0].extra_objects += self.compile_kernels()
            if not self.is_developed:
                extension.sources = support.merged(extension.sources, Path(self.build_temp), ROOT)
            super().build_extensions()

        def compile_kernels(self) -> list[str]:
            """BuildExtension has no flags per source: these objects are ready before it starts."""
            inputs = [ROOT / name for name in sources(*HEADERS)]
            objects: list[Path] = []
            todo: list[tuple[list[str], Path]] = []
            for isa, flags in isas.items():
                source = ROOT / "csrc" / "cpu" / f"kernels_{isa}.cpp"
                target = self.kernels_temp / f"kernels_{isa}.o"
                command = [*shlex.split(compiler), *self.compiler.compiler_so[1:], *COMMON_FLAGS]
                command += ["-std=c++17", "-fno-math-errno", *flags, f"-I{ROOT / 'csrc'}"]
                command += [*system_of_kernels, "-c", str(source), "-o", str(target)]
                objects.append(target)
                if support.outdated(target, command, [source, *inputs]):
                    print(f"compiling {source.name} with {' '.join(flags) or 'no ISA flags'}")
                    todo.append((command, target))
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda job: support.compile_object(*job), todo))
            return [str(path) for path in objects]

        def run(self) -> None:
            # Whether the source tree is what will be imported, and compiled again after changes.
            # Asked here, as setuptools resets self.inplace while it compiles.
            self.is_developed = bool(self.inplace or getattr(self, "editable_mode", False))
            with support.whole_or_again(self.kernels_temp / "unfinished") as again:
                self.force = self.force or again
                self.run_and_record()

        def run_and_record(self) -> None:
            super().run()
            text = support.build_record({"VERSION": self.distribution.get_version(), **facts})
            folders = [Path(self.build_lib, "bnorm_ext")]
            if self.is_developed:
                folders.append(ROOT / "bnorm_ext")
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                support.replace_text(folder / "_build.py", text)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


def torchs_symbols(torch: Any) -> Callable[[str], bool]:
    """Whether torch's libraries, with those that they have loaded, define a symbol."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return lambda name: hasattr(library, name)


def compiler_name(command: str) -> str:
    return support.run_tool(*shlex.split(command), "--version").splitlines()[0].strip()


os.chdir(ROOT)
needs_torch = support.TORCH_COMMANDS.intersection(sys.argv[1:])
setuptools.setup(**(configure() if needs_torch else {}))
