"""Batch normalisation in basic torch operations, of which `_transforms` builds its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over values of ``dtype`` are accumulated."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def per_channel(t: Tensor | None, like: Tensor) -> Any:
    """(C,) -> (1, C, 1, ...) with the rank of ``like`` and in its accumulation type; None -> 1."""
    if t is None:
        return 1.0
    return t.to(accumulation_type(like.dtype)).reshape(1, -1, *[1] * (like.dim() - 2))


class Normalised:
    """The normalised input ``xhat``, from which `_transforms` builds its derivatives.

    In training the statistics are computed from x again: under nested transforms the saved ones do
    not carry their dependence on x at every level.

    Attributes:
        xhat: (N, C, ...), in the accumulation type of x.
        rstd: (1, C, 1, ...), 1 / sqrt(var + eps).
        dims: all dimensions but the channels.
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
        """(N, C, ...) -> (1, C, 1, ...): the mean of each channel."""
        return v.mean(self.dims, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        """P(v) of `_transforms`: v without its components along 1 and along xhat. In inference v
        itself."""
        if not self.training:
            return v
        return v - self.average(v) - self.xhat * self.average(v * self.xhat)


# vmap maps a dimension of size B. It is folded into the channels, because one batch norm of
# (N, B * C, ...) is B batch norms of (N, C, ...).


def fold(x: Tensor, dim: int | None, B: int) -> Tensor:
    """(N, C, ...) mapped over ``dim``, or the same for all maps -> (N, B * C, ...)."""
    if dim is None:
        x = x.unsqueeze(1).expand(-1, B, *[-1] * (x.dim() - 1))
    else:
        x = x.movedim(dim, 1)
    return x.flatten(1, 2)


def fold_vector(t: Tensor | None, dim: int | None, B: int) -> Tensor | None:
    """(C,) mapped over ``dim``, or the same for all maps -> (B * C,)."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(B, *[-1] * t.dim()) if dim is None else t.movedim(dim, 0)
    return t.reshape(-1).clone()  # not a view: the caller copies updates back itself


def fold_mean(t: Tensor, dim: int | None, B: int) -> Tensor:
    """As `fold_vector`, for a mean: (C,), or (2, C) as `batch_norm_training` returns it."""
    if dim is None:
        t = t.unsqueeze(-2).expand(*t.shape[:-1], B, -1)
    else:
        t = t.movedim(dim, -2)
    return t.flatten(-2).contiguous()


def unfold(x: Tensor, B: int) -> Tensor:
    """(N, B * C, ...) -> (N, B, C, ...)."""
    unfolded: Tensor = x.unflatten(1, (B, -1))
    return unfolded
