"""A batch that is split between processes gives what one process with the whole batch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import bnorm_ext
from bnorm_ext.distributed import module
from tests.common.ranks import Ranks, ranks
from tests.common.sync_cases import CASES, Case, assert_equal, expected, split

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

WORLDS = (2, 3)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"{w} processes")
def group(request, tmp_path_factory):
    with ranks(request.param, tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.mark.parametrize("name", CASES)
def test_split_batch_equals_whole(group: Ranks, name: str) -> None:
    case = CASES[name]
    assert_equal(group(split, case), expected(case, group.world), case)


@pytest.mark.parametrize("name", ["uneven", "silu, residual", "cumulative average"])
def test_without_kernels(group: Ranks, name: str) -> None:
    """In torch's own operations."""
    case = CASES[name]
    assert_equal(group(split_without_kernels, case), expected(case, group.world), case)


def split_without_kernels(rank: int, case: Case) -> dict[str, Any]:
    known = module.KERNEL_DEVICES
    try:
        module.KERNEL_DEVICES = frozenset()
        return split(rank, case)
    finally:
        module.KERNEL_DEVICES = known


def test_a_counter_without_statistics_counts(group: Ranks) -> None:
    assert group(counter_alone) == [1] * group.world


def counter_alone(rank: int) -> int:
    bn = bnorm_ext.SyncBatchNorm(3)
    bn.running_mean = bn.running_var = None
    bn(torch.arange(6.0).view(2, 3) + rank)
    return bn.num_batches_tracked.item()


def test_same_bits_from_run_to_run(group: Ranks) -> None:
    case = Case(dtype=torch.float32, act="relu", residual=True, sizes=(3, 4, 5))
    first, second = group(split, case), group(split, case)
    threads = group(split_with_threads, case)
    for a, b, c in zip(first, second, threads, strict=True):
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
            assert torch.equal(value, c[name]), name


def split_with_threads(rank: int, case: Case) -> dict[str, Any]:
    torch.set_num_threads(3)
    try:
        return split(rank, case)
    finally:
        torch.set_num_threads(1)
