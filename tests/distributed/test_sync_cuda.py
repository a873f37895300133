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
from bnorm_ext.distributed import collectives
from tests.common.sync_cases import CASES, C, Case, assert_equal, expected, parameters, whole

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


def run(layer: torch.nn.Module, case: Case, steps: list[tuple[torch.Tensor, ...]]) -> Any:
    found: dict[str, Any] = {}
    for i, (x, r, dy) in enumerate(steps):
        x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x, r) if case.residual else layer(x)
        y.backward(dy)
        found |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
        if case.residual:
            found[f"dresidual{i}"] = r.grad
        found |= {f"d{name}{i}": p.grad.clone() for name, p in layer.named_parameters()}
    found |= {name: b.clone() for name, b in layer.named_buffers()}
    return {name: t.cpu() for name, t in found.items()}


def work(rank: int, folder: str) -> None:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    given = collectives.GATHER_BYTES
    results = {}
    for name, case in CASES.items():
        layer = parameters(bnorm_ext.SyncBatchNorm(C, act=case.act, **case.options), case.dtype)
        start = sum(case.sizes[:rank])
        part = slice(start, start + case.sizes[rank])
        steps = [tuple(t[part].cuda() for t in step) for step in whole(case, WORLD)]
        collectives.GATHER_BYTES = 0 if case.summed else given
        results[name] = run(layer.cuda(), case, steps)
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
