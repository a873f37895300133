"""What setup.py decides about CUDA: in or out, and which toolkit."""

from __future__ import annotations

import pytest

from tests.common.build_tools import CUDA_13, cuda, cuda_plan, fake_nvcc

# --- CUDA in or out -------------------------------------------------------------------------------


def test_cuda_is_in_when_torch_and_toolkit_agree():
    found = cuda_plan()
    assert found.toolkit is CUDA_13
    assert "13.0" in found.line()


def test_a_minor_version_may_differ():
    assert cuda_plan(torch_cuda="13.2").toolkit is CUDA_13


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"torch_cuda": None}, "torch 2.99.0 is no CUDA build"),
        ({"toolkit": "no nvcc was found"}, "no nvcc was found"),
        ({"has_kernels": False}, "none in this source tree"),
    ],
)
def test_cuda_left_out_says_why_and_insisting_fails(arguments, why):
    found = cuda_plan(**arguments)
    assert found.toolkit is None
    assert why in found.line()
    assert "\n" not in found.line()
    with pytest.raises(SystemExit, match=why):
        cuda_plan({"BNORM_EXT_CUDA": "1"}, **arguments)


def test_cuda_0_forces_the_cpu_even_where_versions_clash():
    found = cuda_plan({"BNORM_EXT_CUDA": "0"}, torch_cuda="12.8")
    assert found.toolkit is None
    assert "BNORM_EXT_CUDA=0" in found.line()


def test_cuda_1_is_content_where_cuda_is_possible():
    assert cuda_plan({"BNORM_EXT_CUDA": "1"}).toolkit is CUDA_13


def test_another_value_is_refused():
    with pytest.raises(SystemExit, match="'yes'"):
        cuda_plan({"BNORM_EXT_CUDA": "yes"})


@pytest.mark.parametrize("wish", ["", "1"])
def test_another_major_version_is_an_error_that_names_both(wish):
    with pytest.raises(SystemExit, match=r"CUDA 12\.8.* CUDA 13\.0"):
        cuda_plan({"BNORM_EXT_CUDA": wish}, torch_cuda="12.8")


# --- the toolkit ----------------------------------------------------------------------------------


def test_toolkit_of_cuda_home_and_cuda_path(tmp_path):
    fake_nvcc(tmp_path / "bin")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        found = cuda.find_toolkit({variable: str(tmp_path)}, which=lambda name: name)
        assert found == cuda.Toolkit(str(tmp_path), "12.8", ("7.5", "8.0", "12.0"))


def test_toolkit_of_a_wrapper_script_on_path(tmp_path):
    """A script in /usr/local/bin is no reason to look for headers in /usr/local/include."""
    nvcc = fake_nvcc(tmp_path / "local" / "bin", top=tmp_path / "real")
    found = cuda.find_toolkit({}, which=lambda name: str(nvcc))
    assert found.home == str(tmp_path / "real")


def test_toolkit_in_the_usual_folder_that_is_not_on_path(tmp_path):
    usual = tmp_path / "cuda"
    fake_nvcc(usual / "bin")
    found = cuda.find_toolkit({}, lambda name: name if "/" in name else None, usual=str(usual))
    assert found == cuda.Toolkit(str(usual), "12.8", ("7.5", "8.0", "12.0"))
    # The nvcc on PATH goes before it.
    other = fake_nvcc(tmp_path / "other" / "bin")
    found = cuda.find_toolkit({}, which=lambda name: str(other), usual=str(usual))
    assert found.home == str(tmp_path / "other")


def test_no_toolkit_and_a_wrong_cuda_home(tmp_path):
    nowhere = str(tmp_path / "cuda")
    found = cuda.find_toolkit({}, which=lambda name: None, usual=nowhere)
    assert found == f"no nvcc was found through CUDA_HOME, CUDA_PATH, PATH or in {nowhere}"
    wrong = cuda.find_toolkit({"CUDA_HOME": str(tmp_path)})
    assert str(tmp_path) in wrong
    assert "not a working nvcc" in wrong
