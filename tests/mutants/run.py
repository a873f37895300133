"""Breaks the CUDA kernels on purpose and asks whether the tests see it.

python tests/mutants/run.py [NAME ...]     all mutants, or those whose name contains NAME

Each .patch file here says, above its diff, which kernels it breaks (Kernel:), which test has to
fail (Test: a test file or id and perhaps -k) and, where the reason is known, what the failure has
to say (Says:). A mutant that no test kills has survived; a patch that does not apply any more is an
error: it has to follow the kernels.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.common import emulated
from tests.mutants.patches import (
    HERE,
    ROOT,
    WORK,
    apply,
    chosen,
    fields,
    judged,
    touched,
)

# A mutant may leave a variable unused. It runs once, which optimised code would not pay for.
FLAGS = [*emulated.FLAGS, "-w", "-O0"]


def judge(path: Path) -> str:
    """Empty: killed for the right reason. Else what is wrong."""
    patch = path.read_text()
    root = WORK / path.stem
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    wrong = apply(patch, root)
    if wrong:
        return wrong
    # Headers of the host files change what these are compiled from, kernels do not.
    host_files = any(name.endswith((".h", ".cpp")) for name in touched(patch))
    hosts = root / "csrc" if host_files else None
    environment = os.environ | {"BNORM_EXT_CSRC": str(root / "csrc")}
    if not fields(patch)["Test"].startswith("test_plan"):
        try:
            library = emulated.build(root / "csrc", hosts=hosts or ROOT / "csrc", flags=FLAGS)
        except RuntimeError as error:
            return f"does not compile: {str(error)[:2000]}"
        environment["BNORM_EXT_EMULATED_LIBRARY"] = str(library)
    wrong = judged(patch, ROOT, environment)
    shutil.rmtree(root, ignore_errors=True)
    return wrong


def main() -> None:
    patches = chosen(HERE)
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
