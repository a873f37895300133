"""The script that installs the package in each way (.ci/install_matrix.py): what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "install_matrix.py"
OUTPUT = "torch: 2.14.1\ncompiler: c++ 12\n"


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """One way whose programs do not run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("install_matrix", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = object.__new__(module.Trial)
    made.folder, made.copy, made.venv = tmp_path, ROOT, tmp_path / "venv"
    made.python, made.building = sys.executable, {"PATH": ""}
    made.venv.mkdir()
    return made


def test_says_what_was_installed(monkeypatch, trial):
    monkeypatch.setattr(trial, "call", lambda *command, cwd=None: OUTPUT)
    assert trial.check().endswith(", torch 2.14.1, c++ 12")


def test_a_package_that_writes_beside_itself(monkeypatch, trial):
    def call(*command, cwd=None):
        (trial.venv / "cache.bin").write_text("written")
        return OUTPUT

    monkeypatch.setattr(trial, "call", call)
    with pytest.raises(RuntimeError, match=r"was written to: .*cache\.bin"):
        trial.check()


def test_a_program_that_fails(trial):
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trial.call(sys.executable, "-c", "raise SystemExit('broken on purpose')")


def test_unknown_way():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "weel"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown: weel; there are plain, editable, wheel" in done.stderr
