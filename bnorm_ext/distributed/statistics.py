"""The statistics of a batch that is spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .agreement import agreed_count
from .collectives import all_gather, all_reduce, gathers

_ops = torch.ops.bnorm_ext


class Buffers(NamedTuple):
    """What a training step updates in place, and how."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None


class Statistics(NamedTuple):
    """Of all ranks' values."""

    mean: Tensor  #: (2, C), in the accumulation type: rounded, and what rounding has left out
    rstd: Tensor  #: (C,), in the accumulation type
    total: Tensor  #: (), values per channel, double, on the device


def over_all_ranks(
    mean: Tensor, var: Tensor, count: Tensor, world: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments (W, C) and counts (W,) that merge to those of all ranks.

    Gathered, W is the number of ranks, in their order, so that merging them gives every rank the
    same bits. Summed, W is 1: the collective gives every rank the same bits.
    """
    C = mean.numel()
    if gathers(world, C):
        gathered = all_gather(torch.cat([mean, var, count]), world, group)
        return gathered[:, :C], gathered[:, C : 2 * C], gathered[:, 2 * C]
    sums = all_reduce(torch.cat([mean * count, count]), group)
    total = sums[C:]
    common = sums[:C] / total
    # About the common mean, so that nothing cancels however far the ranks' means lie apart.
    m2 = all_reduce((var + (mean - common).square()) * count, group)
    return common.unsqueeze(0), (m2 / total).unsqueeze(0), total


def synchronised(
    x: Tensor, layer: str, buffers: Buffers, eps: float, world: int, group: Any
) -> Statistics | None:
    """Statistics over all ranks; ``buffers`` are updated. None where no rank has a value.

    Raises:
        ValueError: the ranks have one value per channel between them.
        RuntimeError: the ranks do not run the same ``layer``.
    """
    mean, var = _ops.batch_norm_stats(x)
    count = agreed_count(x, layer, group.group_name)
    means, vars, counts = over_all_ranks(mean, var, count, world, group)
    total = counts.sum()
    if not has_values(x, total):
        return None
    mean, rstd = _ops.batch_norm_merge_stats(means, vars, counts, *buffers, eps, x.dtype)
    return Statistics(mean, rstd, total)


def has_values(x: Tensor, total: Tensor) -> bool:
    """Whether any rank has a value.

    Raises:
        ValueError: they have one per channel between them.
    """
    # A rank with several values knows. Where it has one at most, the host waits for the device.
    # Where it cannot, in a compiled graph or while a CUDA graph is captured, merging decides.
    if x.numel() // x.size(1) > 1 or torch.compiler.is_compiling():
        return True
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    values = int(total.item())
    if values == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{x.size()}, and one value per channel over all ranks"
        )
    return values > 1
