"""A build without CUDA kernels beside a torch with CUDA: said once, at the first CUDA tensor."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bnorm_ext
from bnorm_ext import _load, functional


@pytest.fixture
def no_kernels(monkeypatch):
    """As if this were such a build, whatever it is, and nothing had been said."""
    monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset({"cpu", "meta"}))
    monkeypatch.setattr(_load, "_warned", False)
    monkeypatch.setattr(_load, "DISABLED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def on_cuda() -> torch.Tensor:
    """No GPU is needed: it has a device, a shape and no memory."""
    with FakeTensorMode():
        return torch.empty((4, 3, 2, 2), device="cuda")


def test_said_once_with_the_command(no_kernels) -> None:
    x = on_cuda()
    with pytest.warns(UserWarning, match="compiled without CUDA kernels") as said:
        assert functional._takes_native_path(x)
    text = str(said[0].message)
    assert f"BNORM_EXT_CUDA=1 {_load.REBUILD}" in text
    assert "a CUDA 13 toolkit" in text
    assert "BNORM_EXT_WARN=0" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional._takes_native_path(x)


def test_the_reason_of_the_build_is_given(no_kernels, monkeypatch) -> None:
    class Build:
        CUDA_LEFT_OUT = "left out (no nvcc was found)"

    monkeypatch.setattr(_load, "_submodule", lambda name: Build)
    with pytest.warns(UserWarning, match=r"kernels, left out \(no nvcc was found\): torch's own"):
        functional._takes_native_path(on_cuda())


@pytest.mark.parametrize(("module", "name", "value"), [
    (_load, "DISABLED", True),
    (torch.version, "cuda", None),
])  # fmt: skip
def test_silent_where_it_is_meant(no_kernels, monkeypatch, module, name, value) -> None:
    monkeypatch.setattr(module, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional._takes_native_path(on_cuda())


def test_other_devices_are_silent(no_kernels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnorm_ext.batch_norm(torch.randn(4, 3, 2, 2), None, None, training=True)
        with FakeTensorMode():
            assert functional._takes_native_path(torch.empty((4, 3), device="xpu"))


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable_silences_it(value: str) -> None:
    code = "from bnorm_ext import _load; print(_load._warned)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BNORM_EXT_WARN": value},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(value == "0")
