"""What is sent: as many bytes and messages as the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import bnorm_ext
from bnorm_ext.bench.traffic import counted
from bnorm_ext.distributed import collectives
from tests.common.ranks import ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def sends(rank: int, channels: int) -> list[list[int]]:
    bn = bnorm_ext.SyncBatchNorm(channels)
    bn(torch.randn(2, channels))  # the ranks agree
    x = torch.randn(3, channels, requires_grad=True)
    with counted() as forward:
        y = bn(x)
    with counted() as backward:
        y.sum().backward()
    with counted() as frozen:
        bn(x.detach()).sum().backward()
    with counted() as evaluation:
        bn.eval()(x)
    return [forward, backward, frozen, evaluation]


@pytest.mark.parametrize(
    "world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_bytes_and_messages(world: int, tmp_path: Any) -> None:
    channels = (1, 64, 2048, 40_000)
    assert not collectives.gathers(world, channels[-1]) or world == 2
    with ranks(world, tmp_path) as group:
        for C in channels:
            for forward, backward, frozen, evaluation in group(sends, C):
                assert (sum(forward), len(forward)) == collectives.forward_bytes(world, C)
                assert (sum(backward), len(backward)) == collectives.backward_bytes(C)
                # Where the input wants no gradient, nothing is sent in backward.
                assert (sum(frozen), len(frozen)) == collectives.forward_bytes(world, C)
                assert evaluation == []


def test_both_ways_are_tried() -> None:
    assert collectives.gathers(2, 2048)
    assert not collectives.gathers(2, 40_000)
    assert not collectives.gathers(4096, 64)


def test_growth() -> None:
    """The bytes of a layer do not grow with the number of ranks beyond the limit."""
    for C in (64, 2048, 1 << 20):
        sizes = [collectives.forward_bytes(world, C)[0] for world in (2, 32, 1024, 4096, 1 << 20)]
        assert max(sizes) <= max(collectives.GATHER_BYTES, (2 * C + 1) * collectives.WORD)
