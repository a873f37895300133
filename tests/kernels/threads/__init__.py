"""The CPU kernels on plain threads, without torch. ``.ci/sanitize.py thread`` runs them under
ThreadSanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support import isa_flags, max_jobs, usable_cores, usable_memory

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"


def build(folder: Path, flags: Sequence[str], *, all_isas: bool = True) -> Path:
    """The program, for all instruction sets of this machine's architecture or for the baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    isas = isa_flags() if all_isas else {"baseline": []}
    x86 = ["-DBNORM_EXT_X86_KERNELS=1"] if "avx2" in isas else []
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    common = [*compiler, "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread", *flags]
    common += ["-Wall", "-Wextra", *x86, f"-I{HERE / 'include'}", f"-I{CSRC}"]
    sources: list[tuple[Path, list[str]]] = [(HERE / "driver.cpp", [])]
    sources += [(CSRC / "cpu" / f"kernels_{isa}.cpp", words) for isa, words in isas.items()]
    objects = [folder / f"{source.stem}.o" for source, _ in sources]

    def compile_one(source: Path, words: Sequence[str], target: Path) -> None:
        subprocess.run([*common, *words, "-c", str(source), "-o", str(target)], check=True)

    jobs = max_jobs(os.environ, usable_memory(), usable_cores(), with_cuda=False)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: compile_one(*job[0], job[1]), zip(sources, objects, strict=True)))
    program = folder / "driver"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True)
    return program
