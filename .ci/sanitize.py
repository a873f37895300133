#!/usr/bin/env python3
"""Runs the CPU extension under sanitizers.

    .ci/sanitize.py                           all of it: tens of minutes
    .ci/sanitize.py address                   AddressSanitizer and UndefinedBehaviorSanitizer
    .ci/sanitize.py address --isa avx2        for one instruction set
    .ci/sanitize.py address -- -k layouts     what follows -- goes to pytest; tests named there
                                              run in place of all
    .ci/sanitize.py thread                    ThreadSanitizer
    .ci/sanitize.py uninitialised             Valgrind's memcheck

address: a copy of the checkout (what git tracks or would add) is compiled with both sanitizers, and
the tests of the operators, of numerics and of faults run on it, once for each instruction set that
this CPU has. torch itself is not instrumented: what is seen is what this package's code does.

thread: the CPU kernels and csrc/cpu/parallel.h without torch, on plain std::threads, whose every
access ThreadSanitizer follows (tests/kernels/standalone/). With torch's OpenMP it would report
races that are none, because it does not know OpenMP's barriers.

uninitialised: the same program without torch, numbers only, under Valgrind: no result may depend on
memory that nothing was written to, as the lanes of a vector beyond the end of a row. Valgrind knows
no AVX-512.

Needs GCC or Clang with the sanitizers' runtimes, Valgrind, and the torch of this Python. Everything
is written below build/sanitize/ and kept, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from checkout import ROOT, copy_checkout, known_to_this_cpu

WORK = ROOT / "build" / "sanitize"
KINDS = ("address", "thread", "uninitialised", "all")
ISAS = ("baseline", "avx2", "avx512")
TESTS = ("tests/operators", "tests/numerics", "tests/properties", "tests/faults")
SANITIZERS = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr "
    "-fno-sanitize-recover=undefined"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, default="all")
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    given, after = sys.argv[1:], []
    if "--" in given:
        given, after = given[: given.index("--")], given[given.index("--") + 1 :]
    options = parser.parse_args(given)
    options.pytest = after
    return options


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def wrapped_compiler() -> Path:
    """A compiler whose last words are the sanitizers' flags, after those of setup.py."""
    # A name that torch's check of compilers knows, in a folder that other flags would change: what
    # was compiled with these is compiled again then.
    path = WORK / f"bin-{zlib.crc32(SANITIZERS.encode()):x}" / "g++"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {compiler()} "$@" {SANITIZERS}\n')
    path.chmod(0o755)
    return path


def runtimes() -> str:
    """The sanitizers' libraries, which have to be loaded before Python."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*shlex.split(compiler()), f"-print-file-name={name}"]
        found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return " ".join(path.strip() for path in found)


def address(options: argparse.Namespace) -> bool:
    # The baseline alone leaves the others out, which take a quarter of an hour to compile so.
    only_baseline = tuple(options.isa) == ("baseline",)
    copy = WORK / ("baseline" if only_baseline else "copy")
    copy_checkout(copy)
    if only_baseline:
        build = copy / "build_support.py"
        text = build.read_text()
        condition = 'if machine.lower() in ("x86_64", "amd64")'
        assert condition in text
        build.write_text(text.replace(condition, f"{condition} and False"))
    building = os.environ | {"CXX": str(wrapped_compiler()), "BNORM_EXT_CUDA": "0"}
    building.pop("PYTHONPATH", None)
    # Not --inplace, which compiles each file for itself: sanitizers double the time of each.
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "."]
    subprocess.run(command, cwd=copy, env=building, check=True)
    running = os.environ | {
        "PYTHONPATH": str(copy),
        "LD_PRELOAD": runtimes(),
        # Python leaks and torch catches signals. A request for too much memory is torch's error.
        # torch is not instrumented and frees what our code has made.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:allocator_may_return_null=1"
        ":detect_container_overflow=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    named = any((copy / word.split("::")[0]).exists() for word in options.pytest)
    tests = [] if named else [name for name in TESTS if (copy / name).is_dir()]
    good = True
    for isa in options.isa:
        if not known_to_this_cpu(isa, running, copy):
            print(f"=== {isa}: left out, this CPU does not have it", flush=True)
            continue
        print(f"=== address and undefined behaviour, {isa}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests, *options.pytest]
        done = subprocess.run(
            command, cwd=copy, env=running | {"BNORM_EXT_CPU_CAPABILITY": isa}, check=False
        )
        good = good and done.returncode == 0
    return good


def standalone(
    options: argparse.Namespace, kind: str, mode: str, flags: list[str], before: list[str]
) -> bool:
    """Runs a mode of the program without torch for each instruction set."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.standalone import build

    only_baseline = tuple(options.isa) == ("baseline",)
    program = build(WORK / kind, ["-O1", "-g1", *flags], all_isas=not only_baseline)
    good = True
    for isa in options.isa:
        done = subprocess.run(
            [*before, program, mode, isa],
            env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
            check=False,
        )
        outcome = {0: "nothing found", 2: "left out, this CPU does not have it"}
        print(f"=== {kind}, {isa}: {outcome.get(done.returncode, 'FAILED')}", flush=True)
        good = good and done.returncode in outcome
    return good


def thread(options: argparse.Namespace) -> bool:
    return standalone(options, "thread", "threads", ["-fsanitize=thread"], [])


def uninitialised(options: argparse.Namespace) -> bool:
    if shutil.which("valgrind") is None:
        print("=== uninitialised: left out, there is no valgrind here", flush=True)
        return True
    valgrind = ["valgrind", "--quiet", "--error-exitcode=66", "--track-origins=yes"]
    return standalone(options, "uninitialised", "numbers", [], valgrind)


def main() -> int:
    options = arguments()
    good = True
    if options.kind in ("thread", "all"):
        good = thread(options) and good
    if options.kind in ("uninitialised", "all"):
        good = uninitialised(options) and good
    if options.kind in ("address", "all"):
        good = address(options) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
