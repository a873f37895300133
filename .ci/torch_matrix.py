#!/usr/bin/env python3
"""Builds and tests this checkout with several versions of torch, one after the other.

    .ci/torch_matrix.py                              all of VERSIONS
    .ci/torch_matrix.py 2.8.0 newest                 these; newest: what pip takes unasked
    .ci/torch_matrix.py 2.7.1 --minimum 2.7          older than the build accepts, as a trial
    .ci/torch_matrix.py --pytest tests/modules/test_modules.py -- 2.13.0      some tests only

For each version: a virtual environment (kept for the next run, unless --delete), a copy of the
checkout (what git tracks or would add), a build without CUDA kernels, pytest. One table at the end
says what came out. A version that fails never stops the others; the exit code is 1 then.

Everything is written below --work, a log of each version included. pip's own variables
(PIP_INDEX_URL ...) are passed on: an index of CPU builds saves several GB for each version.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT, copy_checkout

#: What is promised: the range that pyproject.toml and README.md name, and what pip takes today.
VERSIONS = (
    *("2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1"),
    "newest",
)
#: Arguments of pytest, as `make test` gives them: several processes, each file in one of them.
PARALLEL = ("--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile")
DEFAULT_TESTS = '-m "not slow"'
COUNTS = ("passed", "failed", "skipped")
SHOWN_LINES = 30  # of a failed step; the log has all


class Failed(Exception):
    """A step that failed; its text is for the table."""


@dataclass
class Row:
    """A line of the table."""

    version: str
    torch: str = "-"
    built: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    @property
    def good(self) -> bool:
        return self.built and not self.problem


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument(
        "--pytest", default=DEFAULT_TESTS, metavar="ARGS", help="instead of '%(default)s'"
    )
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "torch-matrix")
    parser.add_argument(
        "--minimum", metavar="X.Y", help="lowers the oldest torch that the copy accepts"
    )
    parser.add_argument(
        "--delete", action="store_true", help="environment and copy go after their tests"
    )
    parser.add_argument(
        "--timeout", type=int, default=3600, metavar="S", help="seconds for each step"
    )
    return parser.parse_args()


def lower_minimum(copy: Path, minimum: str) -> None:
    major, minor = minimum.split(".")
    line = f"MIN_TORCH = ({major}, {minor})"
    substitute(copy / "build_support.py", r"MIN_TORCH = \(.*\)", line)
    substitute(copy / "pyproject.toml", r'"torch>=.*?"', f'"torch>={minimum}"')


def substitute(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text(), count=1)
    if count != 1:
        raise Failed(f"{path.name} has no {pattern}")
    path.write_text(text)


class Trial:
    """One version."""

    def __init__(self, version: str, options: argparse.Namespace) -> None:
        self.row = Row(version)
        self.options = options
        self.environment = options.work / f"venv-{version}"
        self.copy = options.work / f"copy-{version}"
        self.log = options.work / f"{version}.log"
        self.python = str(self.environment / "bin" / "python")

    def run(self) -> Row:
        self.options.work.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        try:
            copy_checkout(self.copy)
            if self.options.minimum is not None:
                lower_minimum(self.copy, self.options.minimum)
            self.install_torch()
            self.build()
            self.test()
        except Failed as failure:
            self.row.problem = str(failure)
        except Exception as error:  # the others must have their turn
            self.row.problem = f"{type(error).__name__}: {error}"
        if self.options.delete:
            shutil.rmtree(self.environment, ignore_errors=True)
            shutil.rmtree(self.copy, ignore_errors=True)
        return self.row

    def step(self, name: str, *command: str, check: bool = True) -> str:
        """Runs a command in the copy; its output goes to the log and is returned."""
        print(f"torch {self.row.version}: {name}", flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)  # no bnorm_ext but the copy's
        environment.pop("BNORM_EXT_CUDA", None)
        if name == "build":  # the tests of the build set it themselves
            environment["BNORM_EXT_CUDA"] = "0"
        with self.log.open("a+") as log:
            log.write(f"\n=== {name}: {shlex.join(command)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                command,
                cwd=self.copy,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(self.options.timeout)
            except subprocess.TimeoutExpired:
                raise Failed(f"{name}: longer than {self.options.timeout} seconds") from None
            finally:
                if process.poll() is None:  # with everything that it started
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(start)
            output = log.read()
        if check and code != 0:
            print(*output.splitlines()[-SHOWN_LINES:], sep="\n", flush=True)
            raise Failed(f"{name}: {first_error(output)}")
        return output

    def install_torch(self) -> None:
        if not Path(self.python).exists():
            self.step("environment", self.options.python, "-m", "venv", str(self.environment))
        newest = self.row.version == "newest"
        torch = ["--upgrade", "torch"] if newest else [f"torch=={self.row.version}"]
        tools = ["setuptools>=77", "ninja"]
        self.step("torch", self.python, "-m", "pip", "install", *torch, *tools)
        code = "import torch; print(torch.__version__)"
        self.row.torch = self.step("version", self.python, "-c", code).split()[-1]

    def build(self) -> None:
        # Pinned, so that no other package's wishes bring another torch. By the version that pip
        # knows it by: torch.__version__ may have more to it, as in 2.8.0+cu128.
        code = "import importlib.metadata; print(importlib.metadata.version('torch'))"
        pin = f"torch=={self.step('pin', self.python, '-c', code).split()[-1]}"
        install = [self.python, "-m", "pip", "install", "--no-build-isolation", "-v"]
        self.step("build", *install, "-e", ".[test]", pin)
        self.step("import", self.python, ".ci/check_install.py")
        self.row.built = True

    def test(self) -> None:
        report = self.copy / "junit.xml"
        report.unlink(missing_ok=True)
        chosen = shlex.split(self.options.pytest)
        # Everything is counted: a failure does not end the run.
        command = [self.python, "-m", "pytest", "-q", *PARALLEL]
        command += [f"--junitxml={report}", *chosen]
        output = self.step("pytest", *command, check=False)
        if not report.exists():
            raise Failed(f"pytest: {first_error(output)}")
        self.row.counts, self.row.problem = read_report(report)
        if self.row.counts["passed"] == 0 and not self.row.problem:
            self.row.problem = "pytest: nothing passed"


def first_error(output: str) -> str:
    """The line that says most of why a command failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"\berror: (?!subprocess|command)", r"^ERROR|^\w*(Error|Exception)\b", r"^E "):
        for line in lines:
            if re.search(pattern, line):
                return line
    return lines[-1] if lines else "no output"


def read_report(path: Path) -> tuple[dict[str, int], str]:
    """Counts, and the first failure with its message, from pytest's JUnit file."""
    counts = dict.fromkeys(COUNTS, 0)
    first = ""
    for case in ET.parse(path).getroot().iter("testcase"):
        broken = case.find("failure")
        if broken is None:
            broken = case.find("error")
        if broken is not None:
            counts["failed"] += 1
            if not first:
                message = (broken.get("message") or "").strip().splitlines() or [""]
                first = f"{case.get('classname')}::{case.get('name')}: {message[0]}"
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, first


def table(rows: list[Row]) -> str:
    header = ("version", "torch", "built", *COUNTS, "first failure")
    lines = [header]
    for row in rows:
        counts = [str(row.counts.get(name, "-")) for name in COUNTS]
        lines.append(
            (row.version, row.torch, "yes" if row.built else "no", *counts, row.problem[:160])
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    shown = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        shown.append("  ".join([*padded, line[-1]]).rstrip())
    return "\n".join(shown)


def main() -> int:
    options = arguments()
    options.work = options.work.resolve()
    rows = [Trial(version, options).run() for version in options.versions]
    print(f"\n{table(rows)}\n\nlogs: {options.work}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
