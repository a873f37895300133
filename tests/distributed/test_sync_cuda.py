"""SyncBatchNorm between GPUs, by NCCL: the numbers of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bnorm_ext
from tests.common.sync_cases import CASES, assert_equal, expected, split

WORLD = 2

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not bnorm_ext.build_info()["cuda_kernels"],
        reason="bnorm_ext was compiled without CUDA kernels",
    ),
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_nccl_available()), reason="this torch has no NCCL"
    ),
]


def work(rank: int, folder: str) -> None:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    results = {name: split(rank, case, "cuda") for name, case in CASES.items()}
    torch.save(results, f"{folder}/results-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nccl")
    mp.spawn(work, (str(folder),), WORLD)
    return [torch.load(Path(folder, f"results-{rank}")) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_split_batch_equals_whole(results: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    assert_equal([result[name] for result in results], expected(case, WORLD), case)
