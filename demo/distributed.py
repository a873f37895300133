"""Trains the demo's net on two processes with synchronised batch norm, and shows that it equals one
process with the whole batch. Three trainings advance step by step in turn:

one process         torch's batch norm, the whole batch, in the first process alone
synchronised        bnorm_ext's, fused, in DistributedDataParallel: a part of the batch each,
                    statistics over all
unsynchronised      torch's, in DistributedDataParallel: a part of the batch each, statistics over
                    that part

All start from the same weights. In float64 what is equal stays equal for the whole training; in
float32 every training amplifies the rounding of its first steps.

Usage: ``python demo/distributed.py``, which starts its processes itself, or
``torchrun --nproc-per-node 2 demo/distributed.py``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from digits import LEARNING_RATE, DigitNet, digits
from show import plot_distributed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import bnorm_ext
from bnorm_ext.bench.options import Parser, whole
from bnorm_ext.bench.report import check_picture

ALONE, SYNC, UNSYNC = "one process", "synchronised", "unsynchronised"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass
class Training:
    """One of the three, in this process."""

    name: str
    model: nn.Module
    part: slice  #: of each batch
    losses: list[float] = field(default_factory=list)  #: over the whole batch
    accuracy: float = float("nan")

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE / 2, momentum=0.9, nesterov=True
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(self.model(images[self.part]), labels[self.part])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        shown = loss.detach()
        if self.name != ALONE:  # parts are equally large
            dist.all_reduce(shown)
            shown /= dist.get_world_size()
        self.losses.append(shown.item())

    @property
    def net(self) -> nn.Module:
        return getattr(self.model, "module", self.model)

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        net = self.net.eval()
        self.accuracy = (net(images).argmax(1) == labels).double().mean().item()


def trainings(rank: int, batch: int, seed: int, like: Tensor) -> list[Training]:
    """Those that this process takes part in: the first all three, the others two."""
    torch.manual_seed(seed)
    net = DigitNet().to(like.device, like.dtype)
    synchronised = bnorm_ext.convert_batchnorm(copy.deepcopy(net), sync=True)
    synchronised, _ = bnorm_ext.fuse_batchnorm_act(synchronised)
    each = batch // dist.get_world_size()
    part = slice(rank * each, (rank + 1) * each)
    found = [
        Training(SYNC, DistributedDataParallel(synchronised), part),
        Training(UNSYNC, DistributedDataParallel(copy.deepcopy(net)), part),
    ]
    return [Training(ALONE, net, slice(None)), *found] if rank == 0 else found


def batches(count: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of each whole batch, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def largest_difference(a: nn.Module, b: nn.Module, buffers: bool) -> float:
    """Of the parameters of two nets, or of their running statistics."""
    names = dict(a.named_buffers() if buffers else a.named_parameters())
    mine, other = a.state_dict(), b.state_dict()
    return max((mine[n].double() - other[n].double()).abs().max().item() for n in names)


def table(found: Sequence[Training]) -> str:
    """Each training beside that of one process; the rows come from the first process."""
    alone = found[0]
    lines = [
        f"{'training':<16}{'last loss':>11}{'test accuracy, %':>18}"
        "   largest difference from one process: losses, parameters, running statistics"
    ]
    for t in found:
        line = f"{t.name:<16}{t.losses[-1]:>11.5f}{100 * t.accuracy:>18.2f}"
        if t is not alone:
            apart = max(abs(a - b) for a, b in zip(t.losses, alone.losses, strict=True))
            nets = (t.net, alone.net)
            line += f"{apart:>17.1e}{largest_difference(*nets, buffers=False):>10.1e}"
            line += f"{largest_difference(*nets, buffers=True):>10.1e}"
        lines.append(line)
    return "\n".join(lines)


def train(rank: int, options: argparse.Namespace) -> None:
    """In every process of an initialised process group."""
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    images, labels, test_images, test_labels = digits(options.seed, device)
    images, test_images = (t.to(DTYPES[options.dtype]) for t in (images, test_images))
    found = trainings(rank, options.batch, options.seed, images)
    order = list(batches(len(labels), options.batch, options.epochs, options.seed))
    world = dist.get_world_size()
    shown = tqdm(order, desc=f"training on {world} processes", unit="step", dynamic_ncols=True,
                 disable=rank != 0)  # fmt: skip
    for batch in shown:
        batch = batch.to(device)
        for training in found:
            training.step(images[batch], labels[batch])
        if rank == 0:
            shown.set_postfix_str(f"loss {found[0].losses[-1]:.4f}", refresh=False)
    for training in found:
        training.evaluate(test_images, test_labels)
    if rank == 0:
        losses = {t.name: t.losses for t in found}
        plot_distributed(losses, world, options.batch // world, device, options.output)
        print(f"\n{table(found)}\n\nplot: {options.output.resolve()}", flush=True)
    dist.barrier()


def initialise(local_rank: int, device: str, **where: object) -> None:
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    # Longer than the first process computes alone.
    dist.init_process_group(backend, timeout=timedelta(seconds=120), **where)


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """The whole life of a process that this program has started."""
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder}/rendezvous", "rank": rank}
    initialise(rank, options.device, **where, world_size=options.processes)
    train(rank, options)
    dist.destroy_process_group()


def parser() -> Parser:
    p = Parser(
        description=__doc__.rpartition("\n\nUsage")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--processes", type=whole(2, 16), default=2, metavar="N",
        help="default: 2; with torchrun, what that says")  # fmt: skip
    add("--batch", type=whole(4, 512), default=16, help="images of all processes; default: 16")
    add("--epochs", type=whole(1, 1000), default=2, help="default: 2")
    add("--seed", type=whole(0, 1 << 32), default=0, help="default: 0")
    add("--dtype", choices=tuple(DTYPES), default="float64", help="default: float64")
    add("--output", type=Path, default=Path("build/demo/distributed.png"), help="the plot")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser()
    options = p.parse_args(arguments)
    by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if by_torchrun else options.processes
    try:
        if options.batch % world or options.batch < 2 * world:
            raise ValueError(
                f"--batch {options.batch}: must be a multiple of the {world} processes, at least "
                f"{2 * world}"
            )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        check_picture(options.output, "--output")
        if not dist.is_available():
            raise ValueError("this torch is built without torch.distributed")
    except (OSError, ValueError) as error:
        p.error(str(error))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if here == world:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name of this host is looked up
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= here
    options.device = "cuda" if enough else "cpu"
    if by_torchrun:
        rank = int(os.environ["RANK"])
        initialise(int(os.environ["LOCAL_RANK"]), options.device)
        train(rank, options)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options, folder), options.processes, daemon=True)


if __name__ == "__main__":
    main()
