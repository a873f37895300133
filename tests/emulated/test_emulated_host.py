"""The host code around the CUDA kernels, run by the emulator: tickets, capture, devices."""

from __future__ import annotations

import pytest
import torch

from tests.common import emulated
from tests.common.cases import assert_promise
from tests.common.emulated_cases import LAYOUTS, made, same_bits


def test_launches_of_one_stream_share_their_tickets() -> None:
    """Many blocks per tile, three calls in one session: the tickets are back at zero each time."""
    c = made((8, 2, 32, 48), torch.float32, "contiguous")
    with emulated.session(capturing=False) as s:
        found = [s.call("batch_norm_stats", s.copy(c.x)) for _ in range(3)]
        means = [mean.clone() for mean, _ in found]
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_launches_in_a_graph_have_tickets_of_their_own() -> None:
    # In float64, where no output has as many bytes as the two tickets.
    c = made((8, 2, 32, 48), torch.float64, "contiguous")
    assert same_bits(emulated.run(c, capturing=True), emulated.run(c))


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
