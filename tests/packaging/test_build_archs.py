"""Which GPUs the CUDA kernels are compiled for, and with which flags."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bnorm_ext
from bnorm_ext import _load
from tests.common.build_tools import CUDA_13, CUDA_126, ROOT, cuda, cuda_plan, fake_nvcc

# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["8.0 9.0+PTX", "8.0;9.0+PTX"])
def test_arch_list_goes_before_the_gpus(given):
    found = cuda_plan({"TORCH_CUDA_ARCH_LIST": given}, gpus=[(8, 9)])
    assert (found.archs, found.chosen_by) == (("8.0", "9.0+PTX"), cuda.BY_LIST)


def test_visible_gpus_alone():
    found = cuda_plan(gpus=[(9, 0), (8, 9), (9, 0)])
    assert (found.archs, found.chosen_by) == (("8.9+PTX", "9.0+PTX"), cuda.BY_GPUS)
    assert found.line().endswith("for 8.9+PTX 9.0+PTX (the visible GPUs)")


def test_a_gpu_that_the_toolkit_does_not_know_compiles_the_newest_ptx_that_it_can():
    assert cuda.archs_of_gpus([(13, 0)], CUDA_13) == ("12.1+PTX",)
    assert cuda.archs_of_gpus([(12, 0), (8, 6)], CUDA_126) == ("8.6+PTX", "9.0+PTX")


def test_gpus_that_are_too_old_count_for_nothing():
    assert cuda.archs_of_gpus([(7, 0), (8, 0)], CUDA_126) == ("8.0+PTX",)
    assert (
        cuda_plan(torch_cuda="12.6", toolkit=CUDA_126, gpus=[(7, 0)]).chosen_by == cuda.BY_DEFAULT
    )


def test_gpus_are_asked_for_only_where_cuda_is_in():
    def fails():
        raise AssertionError("torch was asked for GPUs")

    for environ, torch_cuda in (({"BNORM_EXT_CUDA": "0"}, "13.0"), ({}, None)):
        cuda.plan_cuda(environ, "2.99.0", torch_cuda, CUDA_13, True, fails)
    cuda.plan_cuda({"TORCH_CUDA_ARCH_LIST": "8.0"}, "2.99.0", "13.0", CUDA_13, True, fails)


def fake_torch(available: bool = True, error: Exception | None = None):
    def capability(index: int) -> tuple[int, int]:
        if error is not None:
            raise error
        return ((8, 6), (9, 0), (8, 6))[index]

    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: 3,
            get_device_capability=capability,
        )
    )


def test_gpus_that_torch_sees():
    assert cuda.visible_gpus(fake_torch()) == {(8, 6), (9, 0)}
    assert cuda.visible_gpus(fake_torch(available=False)) == set()
    assert cuda.visible_gpus(fake_torch(error=RuntimeError("the driver is too old"))) == set()


def test_default_archs_follow_toolkit_and_machine():
    found = cuda_plan()
    assert found.chosen_by == cuda.BY_DEFAULT
    assert cuda.default_archs(CUDA_13, "x86_64") == ("7.5", "8.0+PTX", "9.0+PTX", "10.0", "12.0")
    assert cuda.default_archs(CUDA_13, "aarch64") == (
        "7.5", "8.0+PTX", "9.0+PTX", "10.0", "11.0", "12.0",
    )  # fmt: skip
    assert cuda.default_archs(CUDA_126) == ("7.5", "8.0+PTX", "9.0+PTX")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        cuda.default_archs(cuda.Toolkit("/opt/cuda", "8.0", ("3.5", "6.0")))


@pytest.mark.parametrize("gpu", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)])
def test_the_default_has_code_for_every_gpu(gpu):
    """Machine code: of the same major version and no higher a minor one."""
    codes = [cuda.number(arch) for arch in cuda.default_archs(CUDA_13, "x86_64")]
    assert any(major == gpu[0] and minor <= gpu[1] for major, minor in codes)


# --- nvcc's flags ---------------------------------------------------------------------------------


def of_list() -> list[str]:
    return ["torch's own"]


def gencode(compute: str, code: str) -> str:
    return f"-gencode=arch=compute_{compute},code={code}"


def test_flags_of_the_default_share_ptx():
    found = cuda.CudaPlan(CUDA_13, "", ("8.0+PTX", "9.0+PTX", "10.0", "12.0"), cuda.BY_DEFAULT)
    assert cuda.arch_flags(found, of_list) == [
        gencode("80", "sm_80"), gencode("80", "compute_80"),
        gencode("90", "sm_90"), gencode("90", "compute_90"), gencode("90", "sm_100"),
        gencode("120", "sm_120"),
    ]  # fmt: skip


def test_the_sources_do_not_distinguish_what_shares_ptx():
    major, minor = cuda.SHARED_PTX
    for path in (ROOT / "csrc").rglob("*.cu*"):
        for bound in re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)", path.read_text()):
            assert int(bound) <= 100 * major + 10 * minor, path


def test_flags_of_gpus_and_of_a_list():
    by_gpus = cuda.CudaPlan(CUDA_13, "", ("8.9+PTX", "12.0+PTX"), cuda.BY_GPUS)
    assert cuda.arch_flags(by_gpus, of_list) == [
        gencode("89", "sm_89"), gencode("89", "compute_89"),
        gencode("120", "sm_120"), gencode("120", "compute_120"),
    ]  # fmt: skip
    by_list = cuda.CudaPlan(CUDA_13, "", ("Ampere",), cuda.BY_LIST)
    assert cuda.arch_flags(by_list, of_list) == of_list()


def nvcc_flags(environ: dict[str, str], toolkit=CUDA_13, archs=5, jobs=2, files=5) -> list[str]:
    return cuda.nvcc_flags(environ, toolkit, archs, jobs, files)


def test_line_numbers_and_warnings_by_environment_variables():
    assert "-lineinfo" not in nvcc_flags({})
    assert "-lineinfo" in nvcc_flags({"BNORM_EXT_LINEINFO": "1"})
    assert not any("-Werror" in flag for flag in nvcc_flags({}))
    strict = nvcc_flags({"BNORM_EXT_WERROR": "1"})
    assert "-Werror=all-warnings" in strict
    assert any(flag.startswith("-Xcompiler=") and flag.endswith(",-Werror") for flag in strict)


def test_compression_and_threads():
    assert "--compress-mode=size" in nvcc_flags({})
    old = nvcc_flags({}, CUDA_126)
    assert "-Xfatbin=-compress-all" in old
    assert not any("compress-mode" in flag for flag in old)
    assert "--threads=1" in nvcc_flags({}, jobs=2)
    assert "--threads=3" in nvcc_flags({}, jobs=16)
    assert "--threads=5" in nvcc_flags({}, jobs=64)


# --- setup.py, with a toolkit and GPUs that are not there -----------------------------------------

SETUP = """
import json, pathlib, runpy, sys
import setuptools, torch
from torch.utils import cpp_extension
torch.version.cuda = "12.8"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {count}
torch.cuda.get_device_capability = lambda index: (8, 0)
caught = {{}}
setuptools.setup = lambda **arguments: caught.update(arguments)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
cpp_extension.BuildExtension.run = lambda self: None
command = caught["cmdclass"]["build_ext"](setuptools.Distribution({{"version": "1"}}))
command.build_lib, command.inplace = {folder!r}, False
command.kernels_temp = pathlib.Path({folder!r})
command.run()
nvcc = caught["ext_modules"][0].extra_compile_args["nvcc"]
print(json.dumps([nvcc, cpp_extension._get_cuda_arch_flags(nvcc)]))
"""


@pytest.mark.parametrize(
    ("count", "environ", "archs", "chosen_by"),
    [
        (2, {}, ("8.0+PTX",), cuda.BY_GPUS),
        (0, {}, ("7.5", "8.0+PTX", "12.0"), cuda.BY_DEFAULT),
        (2, {"TORCH_CUDA_ARCH_LIST": "7.5;8.6"}, ("7.5", "8.6"), cuda.BY_LIST),
    ],
)
def test_setup_takes_the_chosen_archs_and_records_them(
    tmp_path, monkeypatch, count, environ, archs, chosen_by
):
    fake_nvcc(tmp_path / "bin")
    unset = ("BNORM_EXT_CUDA", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(count=count, folder=str(tmp_path))],
        cwd=ROOT, env={**clean, "CUDA_HOME": str(tmp_path), **environ},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert f"CUDA kernels: toolkit 12.8, for {' '.join(archs)} ({chosen_by})" in lines[0]
    nvcc, added_by_torch = json.loads(lines[-1])
    codes = re.findall(r"code=sm_(\d+)", " ".join(nvcc + added_by_torch))
    assert codes == [arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    assert added_by_torch == []

    record: dict[str, object] = {}
    exec((tmp_path / "bnorm_ext" / "_build.py").read_text(), record)
    monkeypatch.setattr(_load, "load", lambda: None)
    monkeypatch.setattr(_load, "_submodule", lambda name: SimpleNamespace(**record))
    info = bnorm_ext.build_info()
    assert info["archs"] == list(archs)
    assert info["archs_from"] == chosen_by
