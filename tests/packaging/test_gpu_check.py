"""`make gpu-check` as far as it goes without a GPU: selections, filters, time-outs, the table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bnorm_ext.bench import cases, micro

ROOT = Path(__file__).resolve().parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / ".ci" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check = _load()


@pytest.fixture
def clean(monkeypatch):
    """main() sets variables for its children."""
    build = ("BNORM_EXT_CUDA", "BNORM_EXT_LINEINFO", "TORCH_CUDA_ARCH_LIST")
    for name in ("PYTHONPATH", "PYTHONUNBUFFERED", *build):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("GPU_CHECK_DRY", raising=False)


def test_dry_run() -> None:
    """Every selection has tests, every kernel is within the sanitizer's filter."""
    done = subprocess.run(
        [sys.executable, ".ci/gpu_check.py"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "GPU_CHECK_DRY": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("=== GPU check\n")[2].splitlines()[1:]
    names = [step.name for step in (gpu_check.build_step(False), *gpu_check.later_steps())]
    assert [line[:18].strip() for line in table] == names
    assert all(" passed " in line for line in table)
    assert sum("tests collected" in line for line in table) == 5


def test_an_empty_selection_is_found() -> None:
    step = gpu_check.Step("t", gpu_check.pytest("tests/kernels/test_cuda.py", "-k", "16-8"), 9)
    assert gpu_check.rehearsed(step)[0] == gpu_check.FAILED


def test_the_filter_matches_mangled_names(monkeypatch) -> None:
    assert gpu_check.kernels_beyond_filter() == []
    monkeypatch.setattr(gpu_check, "KERNELS", "bnorm_ext::cuda")
    assert "merge.cu: merge_kernel" in gpu_check.kernels_beyond_filter()
    assert len(gpu_check.kernels_beyond_filter()) == 8


def test_captured_steps_have_torchs_cache() -> None:
    """cudaMalloc is not allowed during capture."""
    selections = [(step.command[-1], step.environment) for step in gpu_check.later_steps()]
    assert [e for k, e in selections if "captured" in k] == [{}]
    assert all("captured" not in k for k, e in selections if e)


def test_a_time_out_ends_the_tool_alone_and_its_children() -> None:
    child = "import subprocess, sys; print('begun'); subprocess.run(['sleep', '60'])"
    code, output = gpu_check.run([sys.executable, "-u", "-c", child], {}, 1.5)
    assert (code, output) == (None, "begun\n")
    step = gpu_check.Step("t", ("-c", ""), 2)
    assert gpu_check.judged(step, code, output) == (gpu_check.TIMED_OUT, "after 2 s")


def test_what_counts_as_passed() -> None:
    step = gpu_check.later_steps()[0]
    assert gpu_check.judged(step, 0, "7 passed, 1 skipped in 2s") == (
        "passed",
        "7 passed, 1 skipped",
    )
    assert gpu_check.judged(step, 0, "8 skipped in 2s")[0] == gpu_check.FAILED
    assert gpu_check.judged(step, 1, "1 failed, 7 passed in 2s") == (
        gpu_check.FAILED, "exit code 1, 1 failed, 7 passed",
    )  # fmt: skip


def test_every_step_is_tried_and_the_exit_code_comes_last(clean, monkeypatch, capsys) -> None:
    done = []

    def run(command, environment, seconds):
        name = command[2] if command[0] == "compute-sanitizer" else command[1:3][-1]
        done.append((name, os.environ["TORCH_CUDA_ARCH_LIST"]))
        return {"memcheck": (None, ""), "pytest": (1, "1 failed")}.get(name, (0, "3 passed"))

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "visible_archs", lambda: ["8.6"])
    monkeypatch.setattr(gpu_check, "sanitizer_missing", lambda tool: "")
    assert gpu_check.main([]) == 1
    names = ["--quiet", "pytest", "memcheck", "memcheck", "racecheck", "synccheck", "bench"]
    assert done == [(name, "8.6") for name in names]
    table = capsys.readouterr().out.partition("=== GPU check\n")[2].splitlines()[1:]
    states = [line[19:29].strip() for line in table]
    assert states == ["passed", "FAILED", "TIMED OUT", "TIMED OUT", "passed", "passed", "passed"]


def test_without_a_gpu_or_a_build_nothing_runs_and_the_table_says_so(
    clean, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *_: (0, ""))
    monkeypatch.setattr(gpu_check, "visible_archs", list)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out.count("not run    ") == 6
    monkeypatch.setattr(gpu_check, "run", lambda *_: (1, ""))
    monkeypatch.setattr(gpu_check, "visible_archs", lambda: ["8.0"])
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out.count("  the build failed") == 6


def test_a_machine_without_the_sanitizer_does_not_fail(clean, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *_: (0, "3 passed"))
    monkeypatch.setattr(gpu_check, "visible_archs", lambda: ["8.0"])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.main([]) == 0


def test_make_compiles_once() -> None:
    """No `pip install .` with another list of architectures before the script's own."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "VENV=build/no-such-environment"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert " -e " not in done.stdout
    assert done.stdout.rstrip().endswith("python .ci/gpu_check.py --install")


def test_the_timings_have_options_that_the_benchmark_knows() -> None:
    (step,) = (s for s in gpu_check.later_steps() if s.name == "timings")
    assert step.command[:2] == ("-m", "bench")
    options = micro.parser("bench").parse_args(step.command[2:])
    assert options.device == "cuda"
    assert options.suite in cases.SUITES


def test_all_files_with_cuda_tests_are_run() -> None:
    """Those that mark tests, and those of the operators that take the fixture `device`."""
    marked = [p for p in ROOT.glob("tests/*/*.py") if "pytest.mark." + "cuda" in p.read_text()]
    taking = [
        p
        for p in ROOT.glob("tests/operators/*.py")
        if re.search(r"^def test_\w+\([^)]*\bdevice\)", p.read_text(), re.MULTILINE)
        or re.search(r"^def test_\w+\([^)]*\bdevice: str\b", p.read_text(), re.MULTILINE)
    ]
    given = [p for p in taking if 'parametrize("device"' not in p.read_text()]
    found = {p.relative_to(ROOT).as_posix() for p in marked + given}
    assert found == set(gpu_check.CUDA_TESTS)
