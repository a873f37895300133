"""What setup.py decides: jobs, instruction sets, stale objects, and the messages of a build that
cannot be. The decisions are functions of build_support.py; the messages are those of setup.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.build_tools import ROOT, fake_nvcc, support

GIB = support.GIB


def test_pre_commit_runs_the_formatters_that_make_lint_runs():
    hooks = ROOT / ".pre-commit-config.yaml"
    if not hooks.exists():
        pytest.skip("only in a checkout")
    pinned = re.findall(r'"([\w-]+==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    run = re.findall(r"[\w-]+==[\d.]+", hooks.read_text())
    assert {name.partition("==")[0] for name in run} == {"ruff", "clang-format"}
    assert set(run) <= set(pinned)


# --- jobs, instruction sets, stale objects --------------------------------------------------------


def test_max_jobs_fits_memory_and_cores():
    assert support.max_jobs({}, 64 * GIB, 8, with_cuda=False) == 8
    assert support.max_jobs({}, 5 * GIB, 8, with_cuda=False) == 2
    assert support.max_jobs({}, 17 * GIB, 8, with_cuda=True) == 4
    assert support.max_jobs({}, GIB // 2, 8, with_cuda=False) == 1
    assert support.max_jobs({"MAX_JOBS": "3"}, GIB, 1, with_cuda=True) == 3
    with pytest.raises(SystemExit, match="MAX_JOBS"):
        support.max_jobs({"MAX_JOBS": "many"}, GIB, 1, with_cuda=False)


def test_memory_and_cores_of_this_machine():
    assert support.usable_memory() > 1 << 20
    assert support.usable_cores() >= 1


def test_instruction_sets():
    assert list(support.isa_flags("x86_64")) == ["baseline", "avx2", "avx512"]
    assert support.isa_flags("aarch64") == {"baseline": []}
    assert support.isa_flags("x86_64")["baseline"] == []
    every_flag = [flag for flags in support.isa_flags("x86_64").values() for flag in flags]
    assert not any(flag.startswith(("-march", "-mtune")) for flag in every_flag)


def test_merged_sources_include_each_source_once(tmp_path):
    names = ["csrc/a.cpp", "csrc/b.cpp", "csrc/cuda/k.cu", "csrc/c.cpp"]
    (tmp_path / "csrc").mkdir()
    kernels, *merged = support.merged(names, tmp_path / "build", tmp_path)
    assert kernels == "csrc/cuda/k.cu"
    assert merged == ["build/sources_0.cpp", "build/sources_1.cpp"]
    included = [re.findall(r'"(.*)"', (tmp_path / name).read_text()) for name in merged]
    assert included == [[f"{tmp_path}/csrc/{n}.cpp" for n in part] for part in ("ac", "b")]
    # Written again only where it differs: else everything would be compiled again.
    os.utime(tmp_path / merged[0], ns=(0, 0))
    support.merged(names, tmp_path / "build", tmp_path)
    assert (tmp_path / merged[0]).stat().st_mtime_ns == 0


SOURCES = """
import json, pathlib, runpy, sys
import setuptools
from torch.utils import cpp_extension
caught = {{}}
setuptools.setup = lambda **arguments: caught.update(arguments)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
def run(self):
    self.inplace = False  # as setuptools does
    self.build_extensions()
    print(json.dumps(caught["ext_modules"][0].sources))
    sys.exit()
cpp_extension.BuildExtension.run = run
cpp_extension.BuildExtension.build_extensions = lambda self: None
command = caught["cmdclass"]["build_ext"](setuptools.Distribution({{"version": "1"}}))
command.extensions, command.compile_kernels = caught["ext_modules"], lambda: []
command.build_temp, command.{option} = {folder!r}, True
command.kernels_temp = pathlib.Path({folder!r})
command.run()
"""


@pytest.mark.parametrize(
    ("option", "is_merged"), [("inplace", False), ("editable_mode", False), ("force", True)]
)
def test_sources_are_merged_but_for_developers(tmp_path, option, is_merged):
    """Who edits a source wants that one compiled again."""
    done = subprocess.run(
        [sys.executable, "-c", SOURCES.format(option=option, folder=str(tmp_path))],
        cwd=ROOT, env={**os.environ, "BNORM_EXT_CUDA": "0"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sources = json.loads(done.stdout.splitlines()[-1])
    assert ("csrc/forward.cpp" in sources) != is_merged
    assert len(list(tmp_path.glob("sources_*.cpp"))) == (2 if is_merged else 0)


def test_no_two_sources_have_one_object():
    """torch names an object after its source without the suffix: x.cpp and x.cu would be one."""
    sources = [p for pattern in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(pattern)]
    stems = [path.with_suffix("") for path in sources]
    assert len(set(stems)) == len(stems) > 20


def test_objects_are_compiled_again_when_a_header_or_the_flags_change(tmp_path):
    source, target = tmp_path / "a.cpp", tmp_path / "out" / "a.o"
    source.write_text("int a;")
    command = [sys.executable, "-c", f"open({str(target)!r}, 'w')"]
    assert support.outdated(target, command, [source])
    support.compile_object(command, target)
    os.utime(source, ns=(0, target.stat().st_mtime_ns - 1))
    assert not support.outdated(target, command, [source])
    assert support.outdated(target, [*command, "-O3"], [source])
    os.utime(source, ns=(0, target.stat().st_mtime_ns + 1))
    assert support.outdated(target, command, [source])
    with pytest.raises(SystemExit, match="compiler failed"):
        support.compile_object([sys.executable, "-c", "raise SystemExit(3)"], target)
    assert support.outdated(target, [sys.executable, "-c", "raise SystemExit(3)"], [])


# --- setup.py's messages, through the hook that pip calls before it downloads dependencies --------

HOOK = "import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel({out!r})"


def run_hook(tmp_path: Path, torch_stub: str, **environ: str) -> str:
    """Output of a build that must fail, in a process whose `import torch` finds the stub."""
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(torch_stub)
    decided = ("BNORM_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX")  # by the tests that need them
    clean = {k: v for k, v in os.environ.items() if k not in decided}
    done = subprocess.run(
        [sys.executable, "-c", HOOK.format(out=str(tmp_path))],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(stub.parent), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    return output


TORCH_STUB = """
class version:
    cuda = {cuda!r}
__version__ = {version!r}
"""


def test_a_build_without_torch_names_the_command(tmp_path):
    output = run_hook(tmp_path, "raise ModuleNotFoundError('No module named torch', name='torch')")
    assert "pip install --no-build-isolation ." in output
    assert "No module named" not in output
    assert "Traceback" not in output


def test_a_broken_torch_shows_its_own_message(tmp_path):
    assert "libfoo.so is missing" in run_hook(tmp_path, "raise ImportError('libfoo.so is missing')")


def test_an_old_torch_is_refused(tmp_path):
    output = run_hook(tmp_path, TORCH_STUB.format(version="2.7.1", cuda=None))
    assert "torch 2.7.1 is too old" in output


def test_insisting_on_cuda_with_a_cpu_torch(tmp_path):
    stub = TORCH_STUB.format(version="2.99.0+cpu", cuda=None)
    output = run_hook(tmp_path, stub, BNORM_EXT_CUDA="1")
    assert "BNORM_EXT_CUDA=1" in output
    assert "torch 2.99.0+cpu is no CUDA build" in output


def test_a_toolkit_of_another_major_version(tmp_path):
    fake_nvcc(tmp_path / "cuda" / "bin", release="12.8")
    stub = TORCH_STUB.format(version="2.99.0", cuda="13.0")
    output = run_hook(tmp_path, stub, CUDA_HOME=str(tmp_path / "cuda"))
    assert "CUDA 13.0" in output
    assert "CUDA 12.8" in output


def test_a_missing_compiler(tmp_path):
    stub = TORCH_STUB.format(version="2.99.0", cuda=None)
    assert "'no-such-c++' was not found" in run_hook(tmp_path, stub, CXX="no-such-c++")


def test_an_old_setuptools_is_refused():
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 is too old"):
        support.check_versions("2.8.0", "65.5.0")
    support.check_versions("2.8.0", "77.0.3")


def test_openmp_of_another_compiler_than_torchs():
    """Its calls would be undefined symbols when the module is loaded."""
    gcc, clang = "g++ (Debian 12.2.0) 12.2.0", "Debian clang version 19.1.7"
    assert support.openmp_flags(gcc, lambda name: False) == (["-fopenmp"], "")
    assert support.openmp_flags(clang, lambda name: name == "__kmpc_fork_call") == (
        ["-fopenmp"],
        "",
    )
    flags, line = support.openmp_flags(clang, lambda name: False)
    assert flags == []
    assert "one thread" in line
    assert "CXX=g++" in line
