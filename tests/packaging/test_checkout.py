"""The scripts of .ci that run each set of CPU kernels (.ci/checkout.py) tell a processor without it
from a package that is broken."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout():
    spec = importlib.util.spec_from_file_location("checkout", ROOT / ".ci" / "checkout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder: Path, text: str) -> Path:
    (folder / "bnorm_ext").mkdir()
    (folder / "bnorm_ext" / "__init__.py").write_text(text)
    return folder


ENVIRONMENT = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": ""}


def test_has_the_kernels(checkout, tmp_path) -> None:
    known = "build_info = lambda: {'cpu_capability': 'baseline'}"
    assert checkout.known_to_this_cpu("baseline", ENVIRONMENT, package(tmp_path, known))


def test_unknown_to_the_processor(checkout) -> None:
    here = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    assert not checkout.known_to_this_cpu("avx1024", here, ROOT)


@pytest.mark.parametrize("text", ["import nothing_of_that_name", "build_info = lambda: 1 / 0"])
def test_broken_package(checkout, tmp_path, text: str) -> None:
    with pytest.raises(RuntimeError, match=r"avx2: the package in .* fails:"):
        checkout.known_to_this_cpu("avx2", ENVIRONMENT, package(tmp_path, text))
