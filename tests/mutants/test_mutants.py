"""Every mutant fits the code of today: its patch applies, and the tests that it names exist.
Whether they fail is asked by `make mutants`, which takes much longer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.mutants import patches

ROOT = patches.ROOT
PATCHES = [*sorted(patches.HERE.glob("*.patch")), *sorted(patches.HERE.glob("host/*.patch"))]

pytestmark = pytest.mark.skipif(
    not PATCHES or shutil.which("patch") is None, reason="no mutants here, or no program `patch`"
)


def test_patches_apply() -> None:
    wrong = {
        path.stem: reason
        for path in PATCHES
        if (reason := patches.apply(path.read_text(), ROOT, "--dry-run"))
    }
    assert not wrong


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_header(path: Path) -> None:
    patch = path.read_text()
    host = path.parent.name == "host"
    about = patches.fields(patch)
    assert {"Test", "Breaks" if host else "Kernel"} <= about.keys()
    assert about.keys() <= {"Test", "Breaks", "Kernel", "Says"}
    assert patches.touched(patch)
    for word in patches.tests_of(patch, ROOT):
        file, *names = word.split("::")
        if not file.endswith(".py"):
            assert not host, "the tests are run together: ids, no options"
            continue
        for name in names:
            function = name.split("[")[0]
            assert re.search(rf"^def {function}\(", Path(file).read_text(), re.MULTILINE)
