"""The host code around the CUDA kernels, run by the emulator: devices, torch's allocator."""

from __future__ import annotations

import pytest
import torch

from tests.common import emulated
from tests.common.cases import assert_promise
from tests.common.emulated_cases import LAYOUTS, made


@pytest.mark.parametrize("device", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"])
def test_devices(device: str) -> None:
    for layout in LAYOUTS:
        c = made((8, 48, 16, 16), torch.float16, layout)
        for multiprocessors in (1, 8):
            results = emulated.run(c, device=device, multiprocessors=multiprocessors)
            assert_promise(c, ours=results)


def test_torch_allocates_as_before_after_a_session() -> None:
    """oneDNN's scratch memory comes and goes without a DataPtr, by the allocator of that moment."""
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(4, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        before = convolution(x)
        with emulated.session():
            pass
        assert torch.equal(convolution(x), before)
