"""What setup.py decides, as plain functions without torch and setuptools, so that tests can ask.

Not installed with the package; travels in the sdist beside setup.py.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

MIN_TORCH = (2, 8)
MIN_SETUPTOOLS = 77  # the first that reads the SPDX license of pyproject.toml

INSTALL_COMMANDS = f"""\
    pip install "torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}" "setuptools>={MIN_SETUPTOOLS}" ninja
    pip install --no-build-isolation .
"""

# Commands of setup.py that compile, or that pip runs just before it downloads the dependencies of
# something that it is going to compile. `sdist` and `egg_info` work without torch.
TORCH_COMMANDS = frozenset(
    {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
)

GIB = 1 << 30


class BuildError(SystemExit):
    """Ends the build with a message for the reader instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nbnorm_ext: {message.rstrip()}\n")


def check_versions(torch_version: str, setuptools_version: str) -> None:
    major = int(setuptools_version.split(".")[0])
    if major < MIN_SETUPTOOLS:
        raise BuildError(
            f"setuptools {setuptools_version} is too old, {MIN_SETUPTOOLS} or newer is needed. "
            f"Please run:\n\n{INSTALL_COMMANDS}"
        )
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        raise BuildError(
            f"torch {torch_version} is too old, {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer is needed. "
            f"Please run:\n\n{INSTALL_COMMANDS}"
        )


def missing_torch_message(python: str) -> str:
    return (
        "this package is compiled against the PyTorch that it will run with, and the Python that\n"
        f"runs this build ({python}) has none. Build isolation (pip's default) hides an installed\n"
        f"one. Please run, in the environment that you will use:\n\n{INSTALL_COMMANDS}"
    )


def run_tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# --- The C++ sources ------------------------------------------------------------------------------


def merged(sources: list[str], folder: Path, root: Path) -> list[str]:
    """The sources with two files in `folder` in place of all C++ sources, which they include.

    Reading torch's headers takes a compiler longer than compiling most of the sources: read twice
    instead of once for each source they take a third of the time. Names in unnamed namespaces must
    differ, therefore; neighbours in the list are kept apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cpp = [name for name in sources if name.endswith(".cpp")]
    result = [name for name in sources if not name.endswith(".cpp")]
    for i in range(2):
        path = folder / f"sources_{i}.cpp"
        text = "".join(f'#include "{root / name}"\n' for name in cpp[i::2])
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        result.append(os.path.relpath(path, root))
    return result


def openmp_flags(compiler: str, torch_has: Callable[[str], bool]) -> tuple[list[str], str]:
    """The flags that make at::parallel_for use threads, and a line for the reader where there are
    none. compiler: its name and version. torch_has: whether torch defines a symbol.

    Clang calls another OpenMP runtime than GCC, and torch's packages contain GCC's.
    """
    if "clang" in compiler.lower() and not torch_has("__kmpc_fork_call"):
        return [], (
            "the CPU kernels run on one thread: Clang's OpenMP is not the one that torch contains. "
            "CXX=g++ compiles them for several"
        )
    return ["-fopenmp"], ""


# --- The CPU kernels, one object per instruction set ----------------------------------------------

X86_ISA_FLAGS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mavx2"),
        "-mprefer-vector-width=512",
    ],
}


def isa_flags(machine: str = platform.machine()) -> dict[str, list[str]]:
    """Instruction sets to compile for -> flags. The host code asks the processor which to call."""
    if machine.lower() in ("x86_64", "amd64") and sys.maxsize > 2**32:
        return X86_ISA_FLAGS
    return {"baseline": []}


def outdated(target: Path, command: list[str], inputs: list[Path]) -> bool:
    """True when target is missing, older than an input, or made by another command."""
    record = target.with_suffix(".cmd")
    if not target.exists() or not record.exists() or record.read_text() != "\n".join(command):
        return True
    made = target.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns >= made for path in inputs)


def compile_object(command: list[str], target: Path) -> None:
    """Run a compiler; afterwards `outdated` knows the command."""
    target.parent.mkdir(parents=True, exist_ok=True)
    record = target.with_suffix(".cmd")
    record.unlink(missing_ok=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError(f"the compiler failed:\n{' '.join(command)}")
    record.write_text("\n".join(command))


# --- Builds that end early ------------------------------------------------------------------------


@contextlib.contextmanager
def whole_or_again(mark: Path) -> Iterator[bool]:
    """Around a build: whether the last one did not come to its end. What it has linked or copied
    may be half a file, and newer than its sources, so that it would be taken for good."""
    again = mark.exists()
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    yield again
    mark.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- How many compilers at once -------------------------------------------------------------------


def usable_memory() -> int:
    """Bytes: what the machine has left, or less where a container is limited to less."""
    found = [16 * GIB]
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        found = [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+) kB", text)] or found
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            found.append(int(Path(limit).read_text()))
    return min(found)


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def max_jobs(environ: Mapping[str, str], memory: int, cores: int, with_cuda: bool) -> int:
    """MAX_JOBS, or as many compilers as fit: one needs about 2 GiB for a C++ file that includes
    torch's headers, 4 GiB for a CUDA file compiled for many GPUs."""
    given = environ.get("MAX_JOBS", "").strip()
    if given:
        if not given.isdigit() or int(given) == 0:
            raise BuildError(f"MAX_JOBS must be a positive number, not {given!r}.")
        return int(given)
    return max(1, min(cores, memory // ((4 if with_cuda else 2) * GIB)))


# --- What was built -------------------------------------------------------------------------------


def build_record(facts: Mapping[str, object]) -> str:
    """The text of bnorm_ext/_build.py, a module that imports nothing."""
    lines = ['"""Written by the build: what this copy of bnorm_ext was compiled with."""', ""]
    lines += [f"{name} = {value!r}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"
