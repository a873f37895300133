#!/usr/bin/env python3
"""Runs the CPU kernels for processors and with a compiler that this machine may not have.

    .ci/other_machines.py                    all of it: ten minutes and more
    .ci/other_machines.py aarch64            cross-compiled by GCC, under qemu-aarch64
    .ci/other_machines.py no-avx clang       x86-64 under an emulated CPU without AVX; Clang
    .ci/other_machines.py --without-torch    the kernels alone: a few minutes

The kernels run in a program without torch (tests/kernels/standalone/), for each instruction set
that the processor has: all results beside plain loops in double, and the bits of several threads
beside those of one. It prints the results' bits as one number for each dtype, and says where they
are those of x86-64 without AVX.

no-avx, with torch: some numerics tests on the installed package. clang, with torch: a copy of the
checkout (what git tracks or would add) is compiled, and tests of numerics and operators run on it.

Debian's packages: g++-aarch64-linux-gnu, qemu-user, clang-19. What is missing is left out with a
line that says so. CLANG names another Clang than clang++-19. Everything is written below
build/other-machines/.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkout import ROOT, copy_checkout, known_to_this_cpu

sys.path.insert(0, str(ROOT))

from build_support import isa_flags
from tests.kernels.standalone import build

WORK = ROOT / "build" / "other-machines"
CLANG = os.environ.get("CLANG", "clang++-19")
ARM_COMPILER = "aarch64-linux-gnu-g++"
#: Of 2008, with SSE4.2 and without AVX. NumPy needs it; the kernels need SSE2.
NO_AVX = ["qemu-x86_64", "-cpu", "Nehalem"]
FLAGS = ["-O2", "-Werror"]
TESTS = ["tests/numerics/test_numerics.py", "tests/operators/test_operators.py"]
#: qemu takes tens of times as long as the processor.
TESTS_IN_QEMU = [TESTS[0], "-k", "shapes or gradients or two_valued"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--without-torch", action="store_true")
    return parser.parse_args()


def missing(*tools: str) -> bool:
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        print(f"left out: there is no {' and no '.join(absent)}")
    return bool(absent)


def passed(
    command: Sequence[str | Path], cwd: Path = ROOT, more: Mapping[str, str] | None = None
) -> bool:
    done = subprocess.run(command, cwd=cwd, env=os.environ | (more or {}), check=False)
    return done.returncode == 0


def ask(command: Sequence[str | Path]) -> tuple[int, str]:
    """Exit code and output. The choice between instruction sets is the processor's."""
    environment = {k: v for k, v in os.environ.items() if k != "BNORM_EXT_CPU_CAPABILITY"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


#: Of x86-64 without AVX: what driver.cpp prints for each dtype.
baseline_bits: dict[str, str] = {}


def bits_of(output: str) -> dict[str, str]:
    """dtype -> the bits that `driver numbers` has printed."""
    return dict(re.findall(r"^(\w+) .* bits (\w+)$", output, re.MULTILINE))


def kernels(program: Path, isas: Sequence[str], emulator: Sequence[str] = ()) -> bool:
    """Runs the program for each of these instruction sets that the processor has."""
    good = True
    for isa in isas:
        code, output = ask([*emulator, program, "numbers", isa])
        if code == 2:
            print(f"{isa}: left out, this processor does not have it")
            continue
        threads_code, threads_output = ask([*emulator, program, "threads", isa])
        print(f"{isa}:\n{output}{threads_output}", end="")
        bits = bits_of(output)
        same = [dtype for dtype in bits if bits[dtype] == baseline_bits.get(dtype)]
        print(f"{isa}: bits of x86-64 without AVX in: {', '.join(same) or 'none'}")
        good = good and code == 0 and threads_code == 0
        print(f"{isa}: {'as it should be' if code == threads_code == 0 else 'FAILED'}", flush=True)
    return good


def no_avx(options: argparse.Namespace) -> bool:
    if missing(NO_AVX[0], "g++"):
        return True
    program = build(WORK / "x86", FLAGS, compiler="g++", machine="x86_64")
    code, chosen = ask([*NO_AVX, program, "choice"])
    print(f"chosen: {chosen.strip()}")
    good = code == 0 and chosen.strip() == "baseline"
    baseline_bits.update(bits_of(ask([*NO_AVX, program, "numbers", "baseline"])[1]))
    good = kernels(program, list(isa_flags("x86_64")), NO_AVX) and good
    if options.without_torch:
        return good
    # OpenBLAS, which NumPy brings, takes this processor for a newer one.
    more = {"OPENBLAS_CORETYPE": "Nehalem", "OMP_NUM_THREADS": "1"}
    return (
        passed([*NO_AVX, sys.executable, "-m", "pytest", "-q", *TESTS_IN_QEMU], more=more) and good
    )


def aarch64(_: argparse.Namespace) -> bool:
    emulator = "qemu-aarch64"
    if missing(ARM_COMPILER, emulator):
        return True
    # Static: without the libraries of that architecture.
    program = build(WORK / "arm", [*FLAGS, "-static"], compiler=ARM_COMPILER, machine="aarch64")
    return kernels(program, ["baseline"], [emulator])


def clang(options: argparse.Namespace) -> bool:
    if missing(CLANG):
        return True
    isas = list(isa_flags())
    good = kernels(build(WORK / "clang", FLAGS, compiler=CLANG), isas)
    if options.without_torch:
        return good
    copy = WORK / "copy"
    copy_checkout(copy)
    more = {"CXX": CLANG, "BNORM_EXT_CUDA": "0", "BNORM_EXT_WERROR": "1", "PYTHONPATH": str(copy)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "."]
    if not passed(command, copy, more):
        return False
    for isa in isas:
        if not known_to_this_cpu(isa, os.environ | more, copy):
            continue  # as said above
        print(f"{isa}, with torch:", flush=True)
        chosen = more | {"BNORM_EXT_CPU_CAPABILITY": isa}
        good = passed([sys.executable, "-m", "pytest", "-q", *TESTS], copy, chosen) and good
    return good


# no-avx first: the others' bits are compared with its.
KINDS = {"no-avx": no_avx, "aarch64": aarch64, "clang": clang}


def main() -> int:
    options = arguments()
    good = True
    for kind, run in KINDS.items():
        if "all" not in options.kinds and kind not in options.kinds:
            continue
        print(f"=== {kind}", flush=True)
        if kind != "aarch64" and platform.machine() not in ("x86_64", "AMD64"):
            print("left out: this machine is not an x86-64")
            continue
        good = run(options) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
