"""Breaks the CUDA kernels on purpose and asks whether the tests see it.

python tests/mutants/run.py [NAME ...]     all mutants, or those whose name contains NAME

Each .patch file here says, above its diff, which kernels it breaks (Kernel:), which test has to
fail (Test: a test file or id and perhaps -k) and, where the reason is known, what the failure has
to say (Says:). A mutant that no test kills has survived; a patch that does not apply any more is an
error: it has to follow the kernels.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "mutants"
sys.path.insert(0, str(ROOT))

from tests.common import emulated  # noqa: E402

# A mutant may leave a variable unused. It runs once, which optimised code would not pay for.
FLAGS = [*emulated.FLAGS, "-w", "-O0"]


def fields(patch: str) -> dict[str, str]:
    head = patch.split("\n\n", 1)[0]
    return dict(line.split(": ", 1) for line in head.splitlines())


def located(test: str) -> str:
    """The test file or id with the folder below tests/ that the file is in."""
    file, *rest = test.split("::")
    (path,) = (ROOT / "tests").rglob(file)
    return "::".join([str(path), *rest])


def judge(path: Path) -> str:
    """Empty: killed for the right reason. Else what is wrong."""
    patch = path.read_text()
    about = fields(patch)
    root = WORK / path.stem
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    applied = subprocess.run(
        ["patch", "--fuzz=0", "-p1", "-d", str(root)],
        input=patch,
        capture_output=True,
        text=True,
        check=False,
    )
    if applied.returncode != 0:
        return f"does not apply: {applied.stdout.strip()}"
    # Headers of the host files change what these are compiled from, kernels do not.
    touched = {line.split("/", 1)[1] for line in patch.splitlines() if line.startswith("+++ b/")}
    hosts = root / "csrc" if any(name.endswith((".h", ".cpp")) for name in touched) else None
    environment = os.environ | {"BNORM_EXT_CSRC": str(root / "csrc")}
    if not about["Test"].startswith("test_plan"):
        try:
            library = emulated.build(root / "csrc", hosts=hosts or ROOT / "csrc", flags=FLAGS)
        except RuntimeError as error:
            return f"does not compile: {str(error)[:2000]}"
        environment["BNORM_EXT_EMULATED_LIBRARY"] = str(library)
    test = shlex.split(about["Test"])
    test[0] = located(test[0])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    shutil.rmtree(root, ignore_errors=True)
    if done.returncode == 0:
        return f"SURVIVED {about['Test']}"
    if done.returncode != 1:
        return f"ended pytest with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    says = about.get("Says", "")
    if says and says not in done.stdout:
        return f"killed for another reason than {says!r}:\n{done.stdout[-2000:]}"
    return ""


def main() -> None:
    patches = sorted(HERE.glob("*.patch"))
    if sys.argv[1:]:
        patches = [p for p in patches if any(name in p.stem for name in sys.argv[1:])]
    emulated.build(flags=FLAGS)  # what mutants share
    start, bad = time.monotonic(), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, wrong in zip(patches, pool.map(judge, patches), strict=True):
            bad += bool(wrong)
            print(f"{path.stem:42} {wrong or 'killed'}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(patches)} mutants, {bad} not killed as they should, {seconds:.0f} s")
    raise SystemExit(bad != 0 or not patches)


if __name__ == "__main__":
    main()
