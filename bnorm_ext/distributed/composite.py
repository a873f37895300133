"""Synchronised batch norm in torch's own operations, differentiable to any order.

For second and higher derivatives, and for devices without kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import compose
from .agreement import agreed_count
from .collectives import AllReduce, all_reduce
from .statistics import Buffers, has_values


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; mean and biased variance (C,) and the number of values (1,), over all ranks."""
    # float32 for 16-bit input, as the kernels accumulate.
    acc = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    wide = x.to(acc)
    dims = [0, *range(2, x.dim())]
    C = x.size(1)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(acc).reshape(1, C, *[1] * (x.dim() - 2))

    total = all_reduce(x.new_full((1,), x.numel() // C, dtype=acc), group)
    mean = AllReduce.apply(wide.sum(dims), group) / total
    centred = wide - per_channel(mean)
    var = AllReduce.apply(centred.square().sum(dims), group) / total
    z = centred * per_channel((var + eps).rsqrt())
    if weight is not None:
        z = z * per_channel(weight)
    if bias is not None:
        z = z + per_channel(bias)
    y = compose(z, None if residual is None else residual.to(acc), act, negative_slope)
    return y.to(x.dtype), mean, var, total


def training_step(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: Buffers,
    eps: float,
    act: str,
    negative_slope: float,
    layer: str,
    group: Any,
) -> Tensor | None:
    """The output, with ``buffers`` updated; None where no rank has a value."""
    agreed_count(x.detach(), layer, group.group_name)
    y, mean, var, total = normalise(x, residual, weight, bias, eps, act, negative_slope, group)
    if not has_values(x, total):
        return None
    running_mean, running_var, counter, momentum = buffers
    with torch.no_grad():
        if counter is not None:
            counter.add_(1)
        new: Any = momentum
        if momentum is None:
            assert counter is not None
            new = 1 / counter.to(mean.dtype)
        for running, batch in ((running_mean, mean), (running_var, var * (total / (total - 1)))):
            if running is not None:
                running.copy_(running + new * (batch - running))
    return y
