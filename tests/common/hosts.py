"""Run by torchrun on each host: trains with synchronised statistics, and compares with one process
that has the whole batch. ``python -m tests.common.hosts``, within torchrun alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnorm_ext
from tests.common.sync_nets import images, loss_of, make


def train(net: nn.Module, samples: slice) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net(images(step, samples))).backward()
        optimizer.step()
    return dict(getattr(net, "module", net).state_dict())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net, _ = bnorm_ext.fuse_batchnorm_act(bnorm_ext.convert_batchnorm(make(), sync=True))
    each = 6 // world
    samples = slice(rank * each, (rank + 1) * each)
    found = train(DistributedDataParallel(net), samples)
    torch.testing.assert_close(found, train(make(), slice(None)), rtol=1e-9, atol=1e-9)
    print(f"rank {rank} of {world}: equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
