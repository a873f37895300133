"""The script that tries versions of torch: what it reports, without trying one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "torch_matrix.py"

pytestmark = pytest.mark.skipif(
    not (SCRIPT.exists() and (ROOT / ".git").exists() and shutil.which("git")),
    reason="the script works on a git checkout",
)


@pytest.fixture
def matrix(monkeypatch):
    spec = importlib.util.spec_from_file_location("torch_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "torch_matrix", module)  # dataclasses look there
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it imports a module beside it
    spec.loader.exec_module(module)
    return module


def test_a_version_that_fails_does_not_stop_the_others(tmp_path):
    """No Python that could make an environment: every version has its line, and says why."""
    command = [sys.executable, str(SCRIPT), "1.0", "newest", "--work", str(tmp_path)]
    done = subprocess.run(
        [*command, "--python", "/bin/false", "--delete"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    for version in ("1.0", "newest"):
        assert [version, "-", "no", "-", "-", "-", "environment:", "no", "output"] in lines
        assert (tmp_path / f"{version}.log").read_text().strip().endswith(f"venv-{version}")
        assert not (tmp_path / f"copy-{version}").exists()


def test_the_copy_is_the_checkout(matrix, tmp_path):
    (tmp_path / "copied-files").write_text("gone.py\n")
    (tmp_path / "gone.py").touch()
    (tmp_path / "build").mkdir()
    matrix.copy_checkout(tmp_path)
    assert not (tmp_path / "gone.py").exists()
    assert (tmp_path / "build").exists()  # objects of the last time
    this = Path(__file__).resolve().relative_to(ROOT)
    for name in ("setup.py", "build_support.py", "pyproject.toml", this):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list((tmp_path / "bnorm_ext").glob("_C*"))
    matrix.lower_minimum(tmp_path, "2.3")
    assert "MIN_TORCH = (2, 3)" in (tmp_path / "build_support.py").read_text()
    assert '"torch>=2.3"' in (tmp_path / "pyproject.toml").read_text()


def test_report(matrix, tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a" name="one"/>
        <testcase classname="tests.a" name="two"><skipped message="no GPU"/></testcase>
        <testcase classname="b" name="three"><failure message="assert 1 == 2&#10;x"/></testcase>
        <testcase classname="tests.b" name="four"><error message="later"/></testcase>
        </testsuite></testsuites>"""
    )
    counts, first = matrix.read_report(path)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert first == "b::three: assert 1 == 2"
    row = matrix.Row("2.0", "2.0+cpu", True, counts, first)
    assert not row.good
    assert matrix.Row("2.0", built=True, counts={"passed": 1}).good
    assert matrix.table([row]).splitlines()[1].split() == [
        *("2.0", "2.0+cpu", "yes", "1", "2", "1", "b::three:", "assert", "1", "==", "2")
    ]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("cc x.cpp\nx.cpp:3:4: error: no member named 'y'\nerror: command 'c++' failed", 1),
        ("Traceback:\n  File x\nImportError: no\n\nlater", 2),
        ("one\ntwo\n\n", 1),
    ],
    ids=["compiler", "Python", "anything"],
)
def test_the_line_that_says_why(matrix, output, line):
    assert matrix.first_error(output) == output.splitlines()[line]
    assert matrix.first_error("") == "no output"


def test_the_versions_are_those_that_are_promised(matrix):
    def found(name: str, pattern: str) -> str:
        (one,) = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE)
        return one

    oldest = found("pyproject.toml", r'"torch>=([\d.]+)"')
    assert found("build_support.py", r"^MIN_TORCH = \((.*)\)$") == oldest.replace(".", ", ")
    assert found("README.md", r'pip install "torch>=([\d.]+)"') == oldest
    assert matrix.VERSIONS[0].rpartition(".")[0] == oldest
    assert found("Makefile", r"^TORCH \?= torch==(.+)$") in matrix.VERSIONS
