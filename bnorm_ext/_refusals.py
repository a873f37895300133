"""Errors that `_transforms` raises where native does, with native's texts.

They are about derivatives with respect to running statistics, and shared buffers under vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Refuses running statistics that require gradients."""
    if not torch.is_grad_enabled():
        return
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and t.requires_grad:
            raise RuntimeError(
                "The function 'native_batch_norm' is not differentiable with respect to argument "
                f"'{name}'. This input cannot have requires_grad True."
            )


def tangents(of_others: Sequence[Tensor | None], of_statistics: Sequence[Tensor | None]) -> None:
    """Refuses tangents of running statistics beside those of other arguments. Without others native
    ignores them."""
    if all(t is None for t in of_others) or all(t is None for t in of_statistics):
        return
    raise RuntimeError(
        "batch_norm is not differentiable wrt running_mean and running_var, they cannot have "
        "forward grad defined"
    )


def shared_buffers(buffers: Sequence[Any], dims: Sequence[int | None]) -> None:
    """Refuses buffers (running_mean, running_var, num_batches_tracked) that are not mapped where
    the input is: several batches cannot update one buffer. The text for the counter is this
    package's own, because native has none."""
    if any(t is not None and d is None for t, d in zip(buffers[:2], dims[:2], strict=True)):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, which "
            "will be updated in place, were not batched.\nIf you are using a module and do not "
            "need eval mode, please set `track_running_stats` to be False.If you are using a "
            "prebuilt module and do not need eval mode, please see the functorch website for "
            "resources on how to patch your module to work with vmap"
        )
    if buffers[2] is not None and dims[2] is None:
        raise RuntimeError(
            "vmap: num_batches_tracked would be updated in place but is not batched, while the "
            "input is."
        )
