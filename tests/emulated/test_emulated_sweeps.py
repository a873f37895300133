"""The CUDA kernels that sweep over a tensor in channels_last twice in one launch, run by the
emulator: what the order of the second sweep, large teams and the L2 ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import emulated
from tests.common.cases import assert_promise, case, normal
from tests.common.emulated_cases import fused, made, same_bits
from tests.common.emulated_host import library
from tests.emulated.test_emulated_mask import packed

PATHS: dict[str, dict[str, Any]] = {
    "block": {"path": "block"},
    "grid": {"path": "grid", "multiprocessors": 3},
}


def blocks_of(line: str) -> int:
    """Of one of `emulated.Session.launches`."""
    return int(line.rsplit(" ", 4)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [24, 5, 37])
@pytest.mark.parametrize("path", PATHS)
def test_mask_is_written_and_read_backward(path: str, channels: int, dtype: torch.dtype) -> None:
    """By threads that have several vectors; gradients through the mask have the bits of those
    through the residual."""
    c, e = fused((2, channels, 24, 25), dtype, "channels_last", "relu", True)
    launches: list[str] = []
    through_mask = emulated.run(c, e, launches=launches.append, **PATHS[path])
    assert ["sweep" in line for line in launches] == [True, True]
    assert torch.equal(through_mask.pop("mask"), packed(through_mask["y"] > 0, c.x))
    e.masked = False
    assert same_bits(emulated.run(c, e, seed=1, **PATHS[path]), through_mask)


@pytest.mark.parametrize(
    ("shape", "dtype", "multiprocessors", "teams"),
    [
        pytest.param((1, 37, 73, 64), torch.float32, 74, 2, id="two teams"),
        pytest.param((1, 80, 73, 128), torch.bfloat16, 37, 1, id="fewer blocks than channels"),
    ],
)
def test_large_teams_share_the_adding_up(
    shape: tuple[int, ...], dtype: torch.dtype, multiprocessors: int, teams: int
) -> None:
    """Of 73 blocks, too many for each to read the sums of all. The tiles of tensors that exceed the
    L2 have twice as many channels."""
    c = made(shape, dtype, "channels_last")
    where: dict[str, Any] = {"path": "grid", "multiprocessors": multiprocessors}
    where |= {"profiles": lambda profile: None, "l2_bytes": 1}
    launches: list[str] = []
    results = emulated.run(c, launches=launches.append, **where)
    assert [blocks_of(line) for line in launches] == [teams * 73] * 2
    assert_promise(c, ours=results)
    assert same_bits(emulated.run(c, seed=1, **where), results)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", PATHS)
def test_first_values_that_are_not_finite(path: str, value: float) -> None:
    """Deviations are not taken from them: the statistics are what two passes find."""
    x = normal((4, 16, 8, 8), seed=1)
    x[0, 2, 0, 0] = value
    c = case(x, torch.float32, layout="channels_last")
    found, expected = emulated.run(c, **PATHS[path]), emulated.run(c)
    for name, t in expected.items():
        assert torch.equal(found[name].isnan(), t.isnan()), name
        assert torch.equal(found[name].isinf(), t.isinf()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 4, 8), (3, 5, 7, 3)])
@pytest.mark.parametrize("path", PATHS)
def test_outputs_that_exceed_the_l2_are_evicted_first(
    path: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """All of y, dx and dresidual, and nothing else; of tensors that fit, nothing."""
    c, e = fused(shape, dtype, "channels_last", "silu", True)
    bytes_of_x = c.x.numel() * c.x.element_size()
    vectors = c.x.numel() if shape[1] == 5 else bytes_of_x // 16
    for l2_bytes, tensors in ((bytes_of_x, [0, 0]), (bytes_of_x - 1, [1, 2])):
        found: list[emulated.Profile] = []
        emulated.run(c, e, profiles=found.append, l2_bytes=l2_bytes, **PATHS[path])
        assert [p.evict_first for p in found] == [n * vectors for n in tensors]
        assert all("sweep" in p.kernel and p.stores > 0 for p in found)


def test_barriers_leave_semaphores_at_zero() -> None:
    """What a team's barrier leaves behind is not what elects the last block of two passes."""
    c = made((2, 8, 32, 48), torch.float32, "channels_last")
    with emulated.session(**PATHS["grid"]) as s:
        x = s.copy(c.x)
        s.call("batch_norm_training", x, None, None, None, None, None, None, 0.1, c.eps,
               "identity", 0.0, False)  # fmt: skip
        mean = s.call("batch_norm_stats", x)[0].clone()
    assert [blocks_of(line) > 1 for line in s.launches] == [True, True]
    assert "sweep" in s.launches[0]
    torch.testing.assert_close(mean, c.x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)


def test_no_cooperative_grid_beside_collectives() -> None:
    """Unless it is asked for."""
    c = made((2, 8, 32, 48), torch.float32, "channels_last")
    try:
        for beside in (False, True):
            library().runner_beside_collectives(beside)
            for path in (None, "grid"):
                lines: list[str] = []
                emulated.run(c, path=path, multiprocessors=3, launches=lines.append)
                swept = ["sweep" in line for line in lines]
                assert swept == ([False] * 4 if beside and path is None else [True] * 2)
    finally:
        library().runner_beside_collectives(False)
