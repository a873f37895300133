"""csrc/cpu/parallel.h and the baseline's CPU kernels on plain threads without torch: beside plain
loops, and under ThreadSanitizer. Of vector instructions it sees few; ``.ci/sanitize.py thread`` and
``.ci/other_machines.py`` have the other instruction sets."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.kernels.standalone import build

TSAN = ["-O1", "-g1", "-fsanitize=thread"]


def check(program, what):
    done = subprocess.run([program, what, "baseline"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_results_are_those_of_plain_loops(tmp_path):
    check(build(tmp_path, ["-O1"], all_isas=False), "numbers")


@pytest.mark.slow
def test_no_races_and_the_bits_of_one_thread(tmp_path):
    (tmp_path / "empty.cpp").write_text("int main() {}")
    command = [os.environ.get("CXX", "g++"), *TSAN, "empty.cpp", "-o", "empty"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this compiler has no ThreadSanitizer")
    check(build(tmp_path, TSAN, all_isas=False), "threads")
