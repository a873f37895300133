"""What both runners of mutants share: patches, their headers, and running the test that has to
fail."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "mutants"


def chosen(folder: Path) -> list[Path]:
    """The patches in ``folder``, or those whose name contains an argument of the program."""
    patches = sorted(folder.glob("*.patch"))
    if sys.argv[1:]:
        patches = [p for p in patches if any(name in p.stem for name in sys.argv[1:])]
    return patches


def fields(patch: str) -> dict[str, str]:
    head = patch.split("\n\n", 1)[0]
    return dict(line.split(": ", 1) for line in head.splitlines())


def touched(patch: str) -> set[str]:
    """The files that a patch changes, relative to the checkout."""
    return {line.split("/", 1)[1] for line in patch.splitlines() if line.startswith("+++ b/")}


def located(test: str, root: Path = ROOT) -> str:
    """The test file or id with the folder below tests/ that the file is in."""
    file, *rest = test.split("::")
    (path,) = (root / "tests").rglob(file)
    return "::".join([str(path), *rest])


def tests_of(patch: str, root: Path) -> list[str]:
    """pytest's arguments for what a patch names: test files or ids, and options."""
    words = shlex.split(fields(patch)["Test"])
    return [located(word, root) if ".py" in word else word for word in words]


def apply(patch: str, root: Path, *options: str) -> str:
    """Changes the files below ``root``. Empty, or why that is not possible."""
    done = subprocess.run(
        ["patch", "--fuzz=0", "-p1", "-d", str(root), *options],
        input=patch,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else f"does not apply: {done.stdout.strip()}"


def judged(patch: str, root: Path, environment: dict[str, str]) -> str:
    """Runs the test that has to fail on the checkout ``root``. Empty: the mutant is killed for the
    right reason. Else what is wrong."""
    about = fields(patch)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests_of(patch, root)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode == 0:
        return f"SURVIVED {about['Test']}"
    if done.returncode != 1:
        return f"ended pytest with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    says = about.get("Says", "")
    if says and says not in done.stdout:
        return f"killed for another reason than {says!r}:\n{done.stdout[-2000:]}"
    return ""
