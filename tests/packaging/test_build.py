"""What setup.py decides: CUDA in or out, architectures, jobs, and the messages of a build that
cannot be. The decisions are functions of build_support.py; the messages are those of setup.py."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "build_support.py").exists():
    pytest.skip("the tests of the build need its source tree", allow_module_level=True)


def _import_support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_support", ROOT / "build_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_support"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


support = _import_support()
GIB = support.GIB
CUDA_13 = support.Toolkit("/opt/cuda", "13.0", ("7.5", "8.0", "8.6", "8.7", "9.0", "10.0", "12.0"))


def plan(
    environ: dict[str, str] | None = None,
    torch_cuda: str | None = "13.0",
    toolkit: object = CUDA_13,
    has_kernels: bool = True,
):
    return support.plan_cuda(environ or {}, "2.99.0", torch_cuda, toolkit, has_kernels)


# --- CUDA in or out -------------------------------------------------------------------------------


def test_cuda_is_in_when_torch_and_toolkit_agree():
    found = plan()
    assert found.toolkit is CUDA_13
    assert found.archs == ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
    assert "13.0" in found.line()


def test_pre_commit_runs_the_formatters_that_make_lint_runs():
    hooks = ROOT / ".pre-commit-config.yaml"
    if not hooks.exists():
        pytest.skip("only in a checkout")
    pinned = re.findall(r'"([\w-]+==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    run = re.findall(r"[\w-]+==[\d.]+", hooks.read_text())
    assert {name.partition("==")[0] for name in run} == {"ruff", "clang-format"}
    assert set(run) <= set(pinned)


def test_a_minor_version_may_differ():
    assert plan(torch_cuda="13.2").toolkit is CUDA_13


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"torch_cuda": None}, "torch 2.99.0 is no CUDA build"),
        ({"toolkit": "no nvcc was found"}, "no nvcc was found"),
        ({"has_kernels": False}, "none in this source tree"),
    ],
)
def test_cuda_left_out_says_why_and_insisting_fails(arguments, why):
    found = plan(**arguments)
    assert found.toolkit is None
    assert why in found.line()
    assert "\n" not in found.line()
    with pytest.raises(SystemExit, match=why):
        plan({"BNORM_EXT_CUDA": "1"}, **arguments)


def test_cuda_0_forces_the_cpu_even_where_versions_clash():
    found = plan({"BNORM_EXT_CUDA": "0"}, torch_cuda="12.8")
    assert found.toolkit is None
    assert "BNORM_EXT_CUDA=0" in found.line()


def test_cuda_1_is_content_where_cuda_is_possible():
    assert plan({"BNORM_EXT_CUDA": "1"}).toolkit is CUDA_13


def test_another_value_is_refused():
    with pytest.raises(SystemExit, match="'yes'"):
        plan({"BNORM_EXT_CUDA": "yes"})


@pytest.mark.parametrize("wish", ["", "1"])
def test_another_major_version_is_an_error_that_names_both(wish):
    with pytest.raises(SystemExit, match=r"CUDA 12\.8.* CUDA 13\.0"):
        plan({"BNORM_EXT_CUDA": wish}, torch_cuda="12.8")


@pytest.mark.parametrize("given", ["8.0 9.0+PTX", "8.0;9.0+PTX"])
def test_arch_list_is_honoured(given):
    assert plan({"TORCH_CUDA_ARCH_LIST": given}).archs == ("8.0", "9.0+PTX")


def test_default_archs_follow_the_toolkit():
    old = support.Toolkit("/opt/cuda", "11.8", ("5.0", "7.0", "7.5", "8.0", "8.9", "9.0"))
    assert support.default_archs(old) == ("7.5", "8.0", "8.9", "9.0+PTX")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        support.default_archs(support.Toolkit("/opt/cuda", "8.0", ("3.5", "6.0")))


# --- the toolkit ----------------------------------------------------------------------------------


def fake_nvcc(folder: Path, release: str = "12.8", top: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\n'
        "--list-gpu-arch) echo compute_80; echo compute_75; echo compute_120 ;;\n"
        f"--dryrun) echo '#$ TOP={top or folder.parent}/bin/..' >&2 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_toolkit_of_cuda_home_and_cuda_path(tmp_path):
    fake_nvcc(tmp_path / "bin")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        found = support.find_toolkit({variable: str(tmp_path)}, which=lambda name: name)
        assert found == support.Toolkit(str(tmp_path), "12.8", ("7.5", "8.0", "12.0"))


def test_toolkit_of_a_wrapper_script_on_path(tmp_path):
    """A script in /usr/local/bin is no reason to look for headers in /usr/local/include."""
    nvcc = fake_nvcc(tmp_path / "local" / "bin", top=tmp_path / "real")
    found = support.find_toolkit({}, which=lambda name: str(nvcc))
    assert found.home == str(tmp_path / "real")


def test_toolkit_in_the_usual_folder_that_is_not_on_path(tmp_path):
    usual = tmp_path / "cuda"
    fake_nvcc(usual / "bin")
    found = support.find_toolkit({}, lambda name: name if "/" in name else None, usual=str(usual))
    assert found == support.Toolkit(str(usual), "12.8", ("7.5", "8.0", "12.0"))
    # The nvcc on PATH goes before it.
    other = fake_nvcc(tmp_path / "other" / "bin")
    found = support.find_toolkit({}, which=lambda name: str(other), usual=str(usual))
    assert found.home == str(tmp_path / "other")


def test_no_toolkit_and_a_wrong_cuda_home(tmp_path):
    nowhere = str(tmp_path / "cuda")
    found = support.find_toolkit({}, which=lambda name: None, usual=nowhere)
    assert found == f"no nvcc was found through CUDA_HOME, CUDA_PATH, PATH or in {nowhere}"
    wrong = support.find_toolkit({"CUDA_HOME": str(tmp_path)})
    assert str(tmp_path) in wrong
    assert "not a working nvcc" in wrong


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
