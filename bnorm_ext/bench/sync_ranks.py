"""What each process of bench/sync.py does. Rank 0 writes what was measured into a file."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnorm_ext

from . import nets, traffic
from .measure import Stats, describe, within_noise
from .steps import training_step

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 1000
#: A collective that waits longer ends the run: a process has died.
TIMEOUT = timedelta(seconds=120)
LOCAL, SYNC, TORCH = "local", "synchronised", "torch synchronised"
NATIVE = "native"


@dataclass(frozen=True)
class Plan:
    """The same for every rank."""

    world: int
    device: str
    shapes: tuple[tuple[int, ...], ...]  #: of one rank's input
    model: str
    batch: int  #: images of one rank
    size: int
    threads: int
    seconds: float  #: of timed calls and steps together


@dataclass
class Contestant:
    name: str
    call: Callable[[], object]
    channels: Sequence[int] = ()  #: of its synchronised batch norms
    formula: Callable[[int, Sequence[int]], traffic.Traffic] = traffic.ours


def work(rank: int, plan: Plan, folder: str) -> None:
    """The whole life of a process."""
    torch.set_num_threads(plan.threads)
    device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name of this host is looked up
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=plan.world,
        timeout=TIMEOUT,
    )
    try:
        torch.manual_seed(rank)
        rows = []
        share = plan.seconds / (len(plan.shapes) + 2)  # steps are longer: two shares
        for shape in plan.shapes:
            fields: dict[str, Any] = {"what": "call", "shape": list(shape)}
            rows += _rows(fields, LOCAL, compete(calls(shape, device), share, device), plan.world)
        fields = {"what": "step", "model": plan.model, "batch": plan.batch, "size": plan.size}
        rows += _rows(fields, NATIVE, compete(steps(plan, device), 2 * share, device), plan.world)
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps(rows))
    finally:
        dist.destroy_process_group()


def calls(shape: tuple[int, ...], device: torch.device) -> list[Contestant]:
    """Forward and backward of one layer."""
    C = shape[1]
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    x.requires_grad_()

    def contestant(name: str, layer: nn.Module, *args: Any) -> Contestant:
        layer.to(device)

        def call() -> None:
            layer(x).backward(dy)
            x.grad = None
            layer.zero_grad()

        return Contestant(name, call, *args)

    found = [
        contestant(LOCAL, bnorm_ext.BatchNorm2d(C)),
        contestant(SYNC, bnorm_ext.SyncBatchNorm(C), [C]),
    ]
    if device.type == "cuda":  # it refuses CPU tensors
        found.append(contestant(TORCH, nn.SyncBatchNorm(C), [C], traffic.torchs))
    return found


def steps(plan: Plan, device: torch.device) -> list[Contestant]:
    """Training steps of a net in DistributedDataParallel."""
    torch.manual_seed(0)  # the same weights on all ranks
    net = nets.NETS[plan.model]()
    torch.manual_seed(dist.get_rank())
    images = torch.randn(plan.batch, 3, plan.size, plan.size, device=device)
    labels = torch.randint(1000, (plan.batch,), device=device)
    channels = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    synchronised = bnorm_ext.convert_batchnorm(copy.deepcopy(net), sync=True)
    # A fused net shares the parameters of what it was made from.
    fused, _ = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(synchronised))
    variants: list[tuple[Any, ...]] = [
        (NATIVE, net),
        ("converted", bnorm_ext.convert_batchnorm(copy.deepcopy(net))),
        (SYNC, synchronised, channels),
        (f"{SYNC}, fused", fused, channels),
    ]
    if device.type == "cuda":
        torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
        variants.append((TORCH, torchs, channels, traffic.torchs))
    found = []
    for name, variant, *rest in variants:
        model = DistributedDataParallel(variant.train().to(device))
        step = training_step(model, images, labels, amp=None, mode=None)
        found.append(Contestant(name, step, *rest))
    return found


@dataclass
class Measured:
    contestant: Contestant
    stats: Stats  #: of the slowest rank of each call
    counted: list[int]  #: bytes of each message of one call


def compete(
    contestants: Sequence[Contestant], seconds: float, device: torch.device
) -> list[Measured]:
    """All in turns, the ranks together. Rank 0's clock says when it is enough."""
    counts = []
    for c in contestants:
        for _ in range(WARM_UP):  # the layers' first calls compare what the ranks normalise
            c.call()
        with traffic.counted() as found:
            c.call()
        counts.append(list(found))
    samples: list[list[float]] = []
    start = time.perf_counter()
    while _go_on(len(samples), time.perf_counter() - start < seconds, device):
        times = [0.0] * len(contestants)
        # Whoever goes first changes.
        order = range(len(contestants))
        for i in order if len(samples) % 2 == 0 else reversed(order):
            _together(device)
            began = time.perf_counter()
            contestants[i].call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[i] = (time.perf_counter() - began) * 1e6
        samples.append(times)
    slowest = torch.tensor(samples, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    columns = slowest.t().tolist()
    return [
        Measured(c, describe(column), count)
        for c, column, count in zip(contestants, columns, counts, strict=True)
    ]


def _together(device: torch.device) -> None:
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _go_on(rounds: int, in_time: bool, device: torch.device) -> bool:
    """What rank 0 decides."""
    wanted = rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or in_time)
    decision = torch.tensor([int(wanted)], device=device)
    dist.broadcast(decision, 0)
    return bool(decision.item())


def _rows(
    fields: dict[str, Any], base: str, found: Sequence[Measured], world: int
) -> list[dict[str, Any]]:
    reference = next(m.stats for m in found if m.contestant.name == base)
    rows = []
    for m in found:
        s, c = m.stats, m.contestant
        formula = c.formula(world, c.channels)
        rows.append(
            {
                **fields,
                "variant": c.name,
                "median_us": round(s.median, 1),
                "p10_us": round(s.p10, 1),
                "p90_us": round(s.p90, 1),
                "rounds": s.rounds,
                "ratio": round(s.median / reference.median, 4),
                "noisy": None if s is reference else within_noise(s, reference),
                "layers": len(c.channels),
                "bytes": sum(m.counted),
                "messages": len(m.counted),
                "formula_bytes": formula.sent_bytes,
                "formula_messages": formula.messages,
            }
        )
    return rows
