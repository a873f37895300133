"""Breaks the Python code and the C++ of host and CPU on purpose, and asks whether the tests see it.

python tests/mutants/host/run.py [NAME ...]     all, or those whose name contains NAME

Each .patch file here says, above its diff, what it breaks (Breaks:) and which tests have to fail
(Test: files or ids). These tests run first on code that nothing has broken, where they have to
pass. A mutant of Python code is a copy of the checkout, beside the extension that is compiled. One
of C++ code is compiled, with the CPU kernels of one instruction set and with few optimisations: the
objects that see the change, in a copy of the checkout that is kept. MAX_JOBS: how many at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

from checkout import copy_checkout  # noqa: E402

from tests.mutants import patches  # noqa: E402

WORK = patches.WORK / "host"
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
# Compiled objects know the path of their sources, and ninja compares times: a whole build is kept
# beside the folder that it was made in, and each mutant starts with a copy of it.
TREE, BUILT = WORK / "tree", WORK / "built"
FASTER = {
    "setup.py": ('"-O3"', '"-O1"'),
    "build_support.py": ('machine.lower() in ("x86_64", "amd64")', "False"),  # the baseline alone
}


def environment(root: Path) -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if not k.startswith("BNORM_EXT_")}
    # Sources that are changed and changed back within a second would fit the bytecode of before.
    return given | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "BNORM_EXT_CUDA": "0"}


def is_cpp(patch: Path) -> bool:
    return any(name.startswith("csrc/") for name in patches.touched(patch.read_text()))


def copy_for_python(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    copy_checkout(target)
    for path in (ROOT / "bnorm_ext").iterdir():
        if path.name == "_build.py" or path.name.startswith("_C."):
            shutil.copy2(path, target / "bnorm_ext" / path.name)


def restore(kept: Path, tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    if kept.exists():
        shutil.copytree(kept, tree, symlinks=True)  # times included


def compiled(tree: Path) -> str:
    """Compiles what has changed. Empty, or the compiler's message."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        "" if done.returncode == 0 else f"does not compile: {(done.stdout + done.stderr)[-2000:]}"
    )


def build_unbroken() -> str:
    restore(BUILT, TREE)
    copy_checkout(TREE)
    for name, (old, new) in FASTER.items():
        text = (TREE / name).read_text()
        assert old in text, name
        (TREE / name).write_text(text.replace(old, new))
    wrong = compiled(TREE)
    if not wrong:
        restore(TREE, BUILT)
    return wrong


def judge_python(path: Path) -> str:
    root, patch = WORK / path.stem, path.read_text()
    copy_for_python(root)
    wrong = patches.apply(patch, root)
    wrong = wrong or patches.judged(patch, root, environment(root))
    shutil.rmtree(root)
    return wrong


def judge_cpp(path: Path) -> str:
    patch = path.read_text()
    restore(BUILT, TREE)
    wrong = patches.apply(patch, TREE) or compiled(TREE)
    return wrong or patches.judged(patch, TREE, environment(TREE))


def fails_unbroken(mutants: list[Path], root: Path) -> bool:
    """Whether a test that mutants name fails without them, and what it says."""
    tests = {test: None for m in mutants for test in patches.tests_of(m.read_text(), root)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=environment(root), check=False).returncode != 0


def judge_all(mutants: list[Path], judge: Callable[[Path], str], jobs: int) -> int:
    bad = 0
    with ThreadPoolExecutor(jobs) as pool:
        for path, wrong in zip(mutants, pool.map(judge, mutants), strict=True):
            bad += bool(wrong)
            print(f"{path.stem:42} {wrong or 'killed'}", flush=True)
    return bad


def main() -> None:
    start = time.monotonic()
    mutants = patches.chosen(HERE)
    cpp = [path for path in mutants if is_cpp(path)]
    python = [path for path in mutants if path not in cpp]
    bad = 0
    if python:
        unbroken = WORK / "unbroken"
        copy_for_python(unbroken)
        if fails_unbroken(python, unbroken):
            sys.exit("tests of mutants in Python fail without them")
        bad += judge_all(python, judge_python, JOBS)
    if cpp:
        wrong = build_unbroken()
        if wrong or fails_unbroken(cpp, TREE):
            sys.exit(wrong or "tests of mutants in C++ fail without them")
        bad += judge_all(cpp, judge_cpp, 1)  # there is one tree
    seconds = time.monotonic() - start
    print(f"{len(mutants)} mutants, {bad} not killed as they should, {seconds:.0f} s")
    raise SystemExit(bad != 0 or not mutants)


if __name__ == "__main__":
    main()
