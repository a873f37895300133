"""The CPU kernels on plain threads, without torch: driver.cpp says what it runs.
``.ci/sanitize.py thread`` runs it under ThreadSanitizer, ``.ci/other_machines.py`` for other
processors and with Clang."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support import isa_flags, max_jobs, usable_cores, usable_memory

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"


def build(
    folder: Path,
    flags: Sequence[str],
    *,
    all_isas: bool = True,
    compiler: str = os.environ.get("CXX", "g++"),
    machine: str = platform.machine(),
) -> Path:
    """The program, for all instruction sets of an architecture or for its baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    isas = isa_flags(machine) if all_isas else {"baseline": []}
    x86 = ["-DBNORM_EXT_X86_KERNELS=1"] if "avx2" in isas else []
    common = [*shlex.split(compiler), "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
    common += ["-pthread", *flags, "-Wall", "-Wextra"]
    sources: list[tuple[Path, list[str]]] = [(HERE / "driver.cpp", [])]
    sources += [(CSRC / "cpu" / "capability.cpp", [])]
    sources += [(CSRC / "cpu" / f"kernels_{isa}.cpp", words) for isa, words in isas.items()]
    objects = [folder / f"{source.stem}.o" for source, _ in sources]

    def compile_one(source: Path, words: Sequence[str], target: Path) -> None:
        command = [*common, *x86, f"-I{HERE / 'include'}", f"-I{CSRC}", *words]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)

    jobs = max_jobs(os.environ, usable_memory(), usable_cores(), with_cuda=False)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: compile_one(*job[0], job[1]), zip(sources, objects, strict=True)))
    program = folder / "driver"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True)
    return program
