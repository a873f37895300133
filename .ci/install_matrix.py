#!/usr/bin/env python3
"""Installs this checkout in the ways that users do, and computes with what came out.

    .ci/install_matrix.py                                     all of WAYS
    .ci/install_matrix.py wheel spaces                        these
    .ci/install_matrix.py sdist --python python3.13 --torch 2.14.1

Each way has a virtual environment of its own and a copy of the checkout (what git tracks or would
add). --torch: installed by pip in each environment; without it the torch of this interpreter
serves, whose version --python must have then. Built without CUDA kernels. Afterwards
.ci/check_install.py runs outside of the copy, and no file of the environment but Python's .pyc may
have changed by it: a package that writes beside itself fails in read-only site-packages. One table
at the end; the exit code is 1 where a way fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from checkout import ROOT, copy_checkout

TOOLS = ("setuptools>=77", "wheel", "numpy")
NO_ISOLATION = ("--quiet", "--no-build-isolation", "--no-deps")


class Trial:
    """One way: the environment, the copy, and what is set while building."""

    def __init__(self, folder: Path, python: str, torch: str | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.copy, self.venv = folder, folder / "copy", folder / "venv"
        self.python = str(self.venv / "bin" / "python")
        hidden = ("PYTHONPATH", "MAX_JOBS", "CXX", "CC")
        self.building = {k: v for k, v in os.environ.items() if k not in hidden}
        self.building["BNORM_EXT_CUDA"] = "0"
        copy_checkout(self.copy)
        self.call(python, "-m", "venv", str(self.venv))
        if torch is not None:
            self.pip("install", "--quiet", f"torch=={torch}", *TOOLS, "ninja")
            return
        self.pip("uninstall", "--quiet", "--yes", "setuptools")  # older than what the build needs
        (site,) = self.venv.glob("lib/python3*/site-packages")
        packages = [path for path in sys.path if path.endswith("-packages")]
        (site / "parent.pth").write_text("\n".join(packages))

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, cwd=cwd or self.copy, env=self.building, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def pip(self, *arguments: str) -> None:
        self.call(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def files(self) -> dict[str, int]:
        """When each file of the environment was last written, Python's own caches apart."""
        every = (p for p in self.venv.rglob("*") if p.is_file() and not p.is_symlink())
        return {str(p): p.stat().st_mtime_ns for p in every if p.suffix != ".pyc"}

    def check(self) -> str:
        """Runs the check elsewhere; returns the versions of Python and torch, and the compiler."""
        before = self.files()
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        script = shutil.copy(self.copy / ".ci" / "check_install.py", elsewhere)
        output = self.call(self.python, str(script), cwd=elsewhere)
        if changed := sorted(set(self.files().items()) ^ set(before.items())):
            raise RuntimeError(f"the environment was written to: {changed[0][0]}")
        found = dict(line.strip().split(": ", 1) for line in output.splitlines() if ": " in line)
        version = self.call(self.python, "-c", "import platform; print(platform.python_version())")
        return f"Python {version.strip()}, torch {found['torch']}, {found['compiler']}"


def plain(trial: Trial) -> None:
    trial.pip("install", *NO_ISOLATION, ".")


def editable(trial: Trial) -> None:
    trial.pip("install", *NO_ISOLATION, "--editable", ".")


def wheel(trial: Trial) -> None:
    trial.pip("wheel", *NO_ISOLATION, "--wheel-dir", "dist", ".")
    (made,) = (trial.copy / "dist").glob("*.whl")
    trial.pip("install", "--quiet", "--no-deps", str(made))


def sdist(trial: Trial) -> None:
    trial.call(trial.python, "setup.py", "--quiet", "sdist", "--dist-dir", "dist")
    (made,) = (trial.copy / "dist").glob("*.tar.gz")
    trial.pip("install", *NO_ISOLATION, str(made))


def no_ninja(trial: Trial) -> None:
    path = []
    for number, folder in enumerate(map(Path, trial.building["PATH"].split(os.pathsep))):
        if (folder / "ninja").exists():  # the same folder without it: compilers may be there too
            others = trial.folder / f"without-ninja-{number}"
            others.mkdir()
            for program in folder.iterdir():
                if program.name != "ninja":
                    (others / program.name).symlink_to(program)
            folder = others
        path.append(str(folder))
    trial.building["PATH"] = os.pathsep.join(path)
    if shutil.which("ninja", path=trial.building["PATH"]):
        raise RuntimeError("there is still a ninja")
    plain(trial)


def one_job(trial: Trial) -> None:
    trial.building["MAX_JOBS"] = "1"
    plain(trial)


def clang(trial: Trial) -> None:
    trial.building["CXX"] = next(c for c in CLANGS if shutil.which(c))
    plain(trial)


CLANGS = ("clang++", *(f"clang++-{version}" for version in range(25, 13, -1)))
#: "spaces" installs as "plain" does, below a folder whose name has spaces.
WAYS: dict[str, Callable[[Trial], None]] = {
    "plain": plain, "editable": editable, "wheel": wheel, "sdist": sdist, "spaces": plain,
    "no-ninja": no_ninja, "one-job": one_job, "clang": clang,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--python", default=sys.executable, help="makes the environments")
    parser.add_argument("--torch", metavar="VERSION")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "install-matrix")
    options = parser.parse_args()
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    return options


def main() -> int:
    options = arguments()
    rows, good = [], True
    for name in options.ways or WAYS:
        if name == "clang" and not any(map(shutil.which, CLANGS)):
            rows.append((name, "left out: there is no Clang"))
            continue
        print(f"=== {name}", flush=True)
        folder = options.work / ("with some spaces" if name == "spaces" else name)
        try:
            trial = Trial(folder.resolve(), options.python, options.torch)
            WAYS[name](trial)
            rows.append((name, f"passed: {trial.check()}"))
        except Exception as error:  # the others must have their turn
            good = False
            print(error, flush=True)
            rows.append((name, "FAILED"))
        shutil.rmtree(folder, ignore_errors=True)
    for name, outcome in rows:
        print(f"{name:10}{outcome}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
