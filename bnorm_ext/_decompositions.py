"""Batch normalisation in plain torch operations: what `_transforms` makes its derivatives of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def per_channel(t: Tensor | None, like: Tensor) -> Any:
    """(C,) as (1, C, 1, ...) in the accumulation type of ``like``; 1 where there is none."""
    if t is None:
        return 1.0
    return t.to(accumulation_type(like.dtype)).reshape(1, -1, *[1] * (like.dim() - 2))


class Normalised:
    """x normalised in plain torch: what the derivatives of the Functions are made of.

    In training the statistics are computed from x once more, since the saved ones do not know at
    every level of nested transforms that they depend on it.
    """

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, training: bool, eps: float) -> None:
        self.dims = [0, *range(2, x.dim())]
        self.training = training
        x = x.to(accumulation_type(x.dtype))
        if training:
            centred = x - self.average(x)
            self.rstd = (self.average(centred.square()) + eps).rsqrt()
        else:
            centred = x - per_channel(mean, x)
            self.rstd = per_channel(rstd, x)
        self.xhat = centred * self.rstd

    def average(self, v: Tensor) -> Tensor:
        return v.mean(self.dims, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        if not self.training:
            return v
        return v - self.average(v) - self.xhat * self.average(v * self.xhat)


# A mapped dimension of size B is folded into the channels: one batch norm of (N, B * C, ...) is B
# batch norms of (N, C, ...).


def fold(x: Tensor, dim: int | None, B: int) -> Tensor:
    if dim is None:
        x = x.unsqueeze(1).expand(-1, B, *[-1] * (x.dim() - 1))
    else:
        x = x.movedim(dim, 1)
    return x.flatten(1, 2)


def fold_vector(t: Tensor | None, dim: int | None, B: int) -> Tensor | None:
    if t is None:
        return None
    t = t.unsqueeze(0).expand(B, *[-1] * t.dim()) if dim is None else t.movedim(dim, 0)
    return t.reshape(-1).clone()  # not a view: the update of the caller's buffer is a copy back


def unfold(x: Tensor, B: int) -> Tensor:
    return x.unflatten(1, (B, -1))
