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


class Gathered(NamedTuple):
    """Of all ranks' values."""

    means: Tensor  #: (W, C), double
    vars: Tensor  #: (W, C), double, biased
    counts: Tensor  #: (W,), double


def merged(g: Gathered, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mean (2, C), which is the rounded one and what rounding has left out, and rstd (C,), in the
    accumulation type of ``dtype``."""
    mean, rstd = _ops.batch_norm_merge_stats(
        g.means, g.vars, g.counts, None, None, None, 0.0, eps, dtype
    )
    return mean, rstd


def update(g: Gathered, buffers: Buffers, eps: float, dtype: torch.dtype) -> None:
    """Updates the running statistics and the counter.

    It stands at the end of a step and merges once more: whatever fails before, memory for the
    output above all, leaves the buffers as they are.
    """
    running_mean, running_var, counter, momentum = buffers
    if running_mean is not None or counter is not None:
        _ops.batch_norm_merge_stats(
            g.means, g.vars, g.counts, running_mean, running_var, counter, momentum, eps, dtype
        )


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


def gathered(x: Tensor, layer: str, world: int, group: Any) -> Gathered | None:
    """What :func:`over_all_ranks` returns for ``x``. None where no rank has a value.

    Raises:
        ValueError: the ranks have one value per channel between them.
        RuntimeError: the ranks do not run the same ``layer``.
    """
    mean, var = _ops.batch_norm_stats(x)
    count = agreed_count(x, layer, group.group_name)
    means, vars, counts = over_all_ranks(mean, var, count, world, group)
    if not has_values(x, counts):
        return None
    return Gathered(means.contiguous(), vars.contiguous(), counts.contiguous())


def has_values(x: Tensor, counts: Tensor) -> bool:
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
    values = int(counts.sum().item())
    if values == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{x.size()}, and one value per channel over all ranks"
        )
    return values > 1
