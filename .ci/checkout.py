"""The checkout, and copies of it to build in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_checkout(target: Path) -> None:
    """The files that git knows or would add. Times are kept, so that only changes compile again."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    record = target / "copied-files"
    if record.exists():
        for gone in set(record.read_text().splitlines()) - wanted:
            (target / gone).unlink(missing_ok=True)
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    record.write_text("\n".join(sorted(wanted)))


def known_to_this_cpu(isa: str, environment: Mapping[str, str], copy: Path) -> bool:
    """Whether the package that was built in ``copy`` takes these CPU kernels on this processor.

    A package that fails for another reason raises RuntimeError: it must not pass for one whose
    processor is too old.
    """
    code = "import bnorm_ext; assert bnorm_ext.build_info()['cpu_capability']"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env={**environment, "BNORM_EXT_CPU_CAPABILITY": isa},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "is not one of this CPU's" not in done.stderr:
        raise RuntimeError(f"{isa}: the package in {copy} fails:\n{done.stderr}")
    return done.returncode == 0
