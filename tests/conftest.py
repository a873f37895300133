"""Fixtures for all tests."""

from __future__ import annotations

import pytest
import torch

import bnorm_ext

pytest.register_assert_rewrite("tests.common")

from tests.common.cases import threads  # noqa: E402  its assertions say what differs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For many small tensors: threads that wait for each other take longer than the work, on a
    busy machine by far."""
    with threads(1):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    """Each device that there are kernels for. CUDA skips with a reason where there is none."""
    if request.param == "cuda":
        if not bnorm_ext.build_info()["cuda_kernels"]:
            pytest.skip("bnorm_ext was compiled without CUDA kernels")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param
