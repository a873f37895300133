"""A run of the benchmark that is interrupted, or whose disk is full, keeps what it has measured or
leaves the old file whole."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import report
from tests.common.bench_programs import QUICKLY

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal(number, tmp_path):
    """To the process, after its first case."""
    file = tmp_path / "a.json"
    file.write_text("old")
    # Four cases of seconds each.
    arguments = [*QUICKLY, "--time-budget", "20", "--cache", "both"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bnorm_ext.bench", *arguments, "--json", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have what they start in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    lines: list[str] = []
    while not any(line.startswith("[1/") for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err
    header, rows = report.read_json(file)
    assert header["interrupted"] is True
    assert {r["pass"] for r in rows} >= {"fwd"}
    assert len(rows) % 3 == 0
    assert "4x3x5x6" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.usefixtures("process_as_it_was")
def test_a_full_disk(tmp_path, capsys):
    """A limit on the size of files stands in for it: both end a write half-way."""
    file = tmp_path / "a.json"
    file.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = cli.main([*QUICKLY, "--json", str(file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    out, err = capsys.readouterr()
    assert code == 1
    assert os.strerror(27) in err  # EFBIG
    assert "4x3x5x6" in out
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
