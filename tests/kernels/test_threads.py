"""csrc/cpu/parallel.h and the CPU kernels under ThreadSanitizer, on plain threads without torch.
The baseline alone: of vector instructions it sees few. ``.ci/sanitize.py thread`` has the rest."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.kernels.threads import build

TSAN = ["-O1", "-g1", "-fsanitize=thread"]


@pytest.mark.slow
def test_no_races_and_the_bits_of_one_thread(tmp_path):
    (tmp_path / "empty.cpp").write_text("int main() {}")
    command = [os.environ.get("CXX", "g++"), *TSAN, "empty.cpp", "-o", "empty"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this compiler has no ThreadSanitizer")
    program = build(tmp_path, TSAN, all_isas=False)
    done = subprocess.run([program, "baseline"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
