"""The collectives that synchronised batch norm sends, and the choice between two ways.

Only public functions of ``torch.distributed`` are used. In a graph that is being compiled,
``torch.compile`` puts its functional collectives in their place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Up to this many bytes received by each rank, statistics are gathered from all ranks in one
#: message; above, they are summed in two.
#:
#: An all-gather moves W * m bytes to each rank (W ranks, m bytes of statistics each) in log2(W)
#: messages after one another. An all-reduce takes 2 * log2(W), and moves about 2 * m bytes whatever
#: W is, which is neglected here. One gathering against two sums saves 3 * log2(W) latencies. With a
#: latency of 10 us and 12.5 GB/s (100 Gb/s), a latency costs what 125 kB cost, and gathering wins
#: while W * m < 125 kB * 3 * log2(W): 0.4 MB for 2 ranks, 1.1 MB for 8, 1.9 MB for 32, 3.8 MB for
#: 1,024. The constant lies in between, so that the decision is easy to foresee.
GATHER_BYTES = 1 << 20

WORD = 8  #: bytes of a number that is sent: a double


def gathers(world: int, channels: int) -> bool:
    """Whether statistics of this many channels are gathered; the same on every rank."""
    return world * (2 * channels + 1) * WORD <= GATHER_BYTES


def forward_bytes(world: int, channels: int) -> tuple[int, int]:
    """What a training forward pass of one layer sends: bytes that each rank receives, and messages
    (collectives). Counted are the results of the collectives, not how a backend routes them."""
    if gathers(world, channels):
        return world * (2 * channels + 1) * WORD, 1
    return (2 * channels + 1) * WORD, 2


def backward_bytes(channels: int) -> tuple[int, int]:
    """As :func:`forward_bytes`, for the backward pass."""
    return 2 * channels * WORD, 1


def all_gather(t: Tensor, world: int, group: Any) -> Tensor:
    """(M,) of each rank -> (world, M), in the order of ranks."""
    gathered = t.new_empty(world * t.numel())
    # torch 2.14 has deprecated the old name; torch.compile replaces the old name's calls.
    if hasattr(dist, "all_gather_single") and not torch.compiler.is_compiling():
        dist.all_gather_single(gathered, t, group=group)
    else:
        dist.all_gather_into_tensor(gathered, t, group=group)
    return gathered.view(world, t.numel())


def all_reduce(t: Tensor, group: Any) -> Tensor:
    """The sum over all ranks, in ``t`` itself."""
    dist.all_reduce(t, group=group)
    return t


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, differentiable: each rank's input goes into the sum of every rank."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(t.clone(), group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return AllReduce.apply(dy.contiguous(), ctx.group), None
