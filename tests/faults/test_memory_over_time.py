"""Memory stays as it is over many training steps: tensors, what C++ keeps, and the process."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.common import failing_allocator
from tests.common.net_kinds import EVERY, images, make

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = int(os.environ.get("BNORM_EXT_MEMORY_STEPS", "300"))
STATM = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes, without what malloc keeps for later."""
    gc.collect()
    process = ctypes.CDLL(None)
    # AddressSanitizer keeps freed memory for a while, and knows what is in use.
    in_use = getattr(process, "__sanitizer_get_current_allocated_bytes", None)
    if in_use is not None:
        in_use.restype = ctypes.c_size_t
        return int(in_use())
    trim = getattr(process, "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(STATM.read_text().split()[1]) * PAGE


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def stepper(kind: str) -> Callable[[], None]:
    net = make(kind).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = images(count=8, size=16)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            net.eval()(x)
        net.train()

    return step


@pytest.mark.skipif(not STATM.exists(), reason="this system does not say what a process has")
@EVERY
def test_training_steps(kind):
    """As many as BNORM_EXT_MEMORY_STEPS says. Half of them come first, as caches fill then. An
    activation that a step kept is 98 kB."""
    step = stepper(kind)
    for _ in range(STEPS // 2):
        step()
    tensors, bytes_before = live_tensors(), resident()
    with failing_allocator.refused(-1):
        step()
        gc.collect()
        blocks = failing_allocator.alive()
        for _ in range(STEPS // 2):
            step()
        gc.collect()
        assert failing_allocator.alive() <= blocks
    assert live_tensors() <= tensors
    grown = resident() - bytes_before
    assert grown < 1_000_000 + 100 * STEPS, f"{grown:,} bytes in {STEPS // 2} steps"


def test_a_step_that_kept_something_would_show():
    step, kept = stepper("converted"), []
    with failing_allocator.refused(-1):
        step()
        blocks = failing_allocator.alive()
        for _ in range(10):
            step()
            kept.append(torch.zeros(10))
        assert failing_allocator.alive() >= blocks + 10


def test_layers_that_come_and_go():
    """Nothing is kept for each module: they, too, are freed."""

    def one() -> None:
        net = make("fused").train()
        net(images()).sum().backward()

    one()
    before, modules = live_tensors(), count_modules()
    for _ in range(5):
        one()
    assert live_tensors() <= before
    assert count_modules() <= modules


def count_modules() -> int:
    gc.collect()
    return sum(issubclass(type(o), nn.Module) for o in gc.get_objects())
