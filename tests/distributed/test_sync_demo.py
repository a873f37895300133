"""demo/distributed.py: it runs, and what it shows is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

for _package, _why in (
    ("sklearn", "the demo's data comes with scikit-learn"),
    ("matplotlib", "the demo draws with matplotlib"),
    ("tqdm", "the demo shows its progress with tqdm"),
):
    pytest.importorskip(_package, reason=_why)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "distributed.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


def differences(printed: str, training: str) -> list[float]:
    """Of losses, parameters and running statistics."""
    line = next(line for line in printed.splitlines() if line.startswith(training))
    return [float(text) for text in re.findall(r"\S+", line)[3:]]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param((), id="alone"),
        pytest.param(
            ("-m", "torch.distributed.run", "--nproc-per-node", "2"),
            id="torchrun",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_equals_one_process(start, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = run(*start, str(DEMO), "--epochs", "1", "--batch", "128", "--output", str(plot))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # the first process's alone
    assert "training on 2 processes: 100%" in done.stderr
    losses, parameters, statistics = differences(done.stdout, "synchronised")
    assert max(losses, parameters, statistics) < 1e-9
    assert min(differences(done.stdout, "unsynchronised")) > 1e-5
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "--processes: at least 2"),
        (["--batch", "15"], "--batch 15: must be a multiple of the 2 processes"),
        (["--batch", "6", "--processes", "4"], "--batch 6: must be a multiple of the 4 processes"),
        (["--output", "plot.txt"], "--output plot.txt: the name must end in"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], message: str) -> None:
    done = run(str(DEMO), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
