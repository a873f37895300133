"""How the CUDA kernels use memory, counted by the emulator: bank conflicts, stores that evict
first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import emulated
from tests.common.cases import DTYPES
from tests.common.emulated_cases import LAYOUTS, fused, made

PATHS: dict[str, dict[str, Any]] = {
    "two_pass": {"path": "two_pass"},
    "block": {"path": "block"},
    "cluster": {"path": "cluster", "device": "sm_90", "multiprocessors": 4},
    "grid": {"path": "grid", "multiprocessors": 3},
}
SHAPES = {
    "contiguous": [(8, 2, 32, 48), (9, 16, 7, 7), (3, 5, 7, 3)],
    "channels_last": [(9, 8, 13, 11), (4, 128, 8, 8), (2, 304, 2, 2), (4, 37, 13, 11)],
}
# What has written and read pairs of sums through shared memory.
REDUCING = ("statistics_kernel", "backward_reduce_kernel", "resident_", "sweep_")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("path", "layout"),
    # There are no clusters in channels_last.
    [(p, at) for p in PATHS for at in LAYOUTS if (p, at) != ("cluster", "channels_last")],
)
def test_sums_and_vectors_have_no_bank_conflicts(
    path: str, layout: str, dtype: torch.dtype
) -> None:
    """All accesses of 16 bytes: sums within a block and within a cluster, and vectors on chip."""
    if path != "two_pass" and dtype == torch.float64:
        pytest.skip("float64 takes two passes")
    found: list[emulated.Profile] = []
    for shape in SHAPES[layout]:
        emulated.run(made(shape, dtype, layout), profiles=found.append, **PATHS[path])
    reducing = [p for p in found if any(name in p.kernel for name in REDUCING)]
    assert len(reducing) == 2 * len(SHAPES[layout])
    for profile in reducing:
        assert profile.ways[16] == 1, profile
    in_one_launch = "sweep" if layout == "channels_last" else "resident"
    assert any(in_one_launch in p.kernel for p in found) == (path != "two_pass")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 16, 4, 8), (3, 5, 7, 3), (4, 16, 7, 7)])
def test_outputs_that_exceed_the_l2_are_evicted_first(
    shape: tuple[int, ...], training: bool, layout: str
) -> None:
    """All of y, dx and dresidual, and nothing else; of tensors that fit, nothing."""
    for dtype in DTYPES:
        c, e = fused(shape, dtype, layout, "silu", True, training=training)
        bytes_of_x = c.x.numel() * c.x.element_size()
        for l2_bytes in (bytes_of_x, bytes_of_x - 1):
            found: list[emulated.Profile] = []
            emulated.run(c, e, profiles=found.append, l2_bytes=l2_bytes)
            writing = {"normalise": 1, "backward_apply": 2}
            for name, tensors in writing.items():
                (profile,) = (p for p in found if name in p.kernel)
                assert profile.stores in (
                    tensors * c.x.numel(),
                    tensors * bytes_of_x // 16,
                )
                assert profile.evict_first == (profile.stores if l2_bytes < bytes_of_x else 0)
            others = [p for p in found if not any(name in p.kernel for name in writing)]
            assert len(others) == 1 + training
            assert all(p.stores > 0 and p.evict_first == 0 for p in others)


def test_outputs_on_chip_are_not() -> None:
    """Their input is not read again."""
    found: list[emulated.Profile] = []
    c = made((4, 16, 4, 8), torch.float32, "contiguous")
    emulated.run(c, profiles=found.append, l2_bytes=1, path="block")
    assert len(found) == 2
    assert all(p.stores > 0 and p.evict_first == 0 for p in found)


def test_the_size_of_the_l2_is_the_devices() -> None:
    """No tensor of a test exceeds it."""
    found: list[emulated.Profile] = []
    emulated.run(made((4, 16, 4, 8), torch.float32, "contiguous"), profiles=found.append)
    assert all(p.evict_first == 0 for p in found)
