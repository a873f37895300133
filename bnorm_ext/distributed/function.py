"""A training step of synchronised batch norm, and its gradient.

With xhat = (x - mean) * rstd, and means over the values of all ranks:

    y  = act(weight * xhat + bias + residual),  g the gradient of act's argument
    dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum(g * xhat), dbias = sum(g), over this rank's values alone

The gradients of the parameters are this rank's share, as all other gradients of a data-parallel
net: DistributedDataParallel and FSDP average them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..activations import PIECEWISE
from . import composite
from .collectives import all_reduce

_ops = torch.ops.bnorm_ext
Gradients = tuple[Tensor | None, ...]


class Normalise(torch.autograd.Function):
    """``act(batch_norm(x) + residual)`` with statistics that are known. Its gradient takes into
    account that they depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        count: Tensor,
        eps: float,
        act: str,
        negative_slope: float,
        group: Any,
    ) -> Tensor:
        # After an addition a piecewise linear activation is known by one bit an element; the
        # others, and one without addition, are computed once more.
        masked = residual is not None and act in PIECEWISE and any(ctx.needs_input_grad[:4])
        y, mask = _ops.batch_norm_apply(
            x, residual, weight, bias, mean, rstd, act, negative_slope, masked
        )
        ctx.arguments = (eps, act, negative_slope, group)
        kept = residual if act != "identity" and not masked else None
        ctx.save_for_backward(x, kept, weight, bias, mean, rstd, count, mask if masked else None)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_gradients(ctx, dy, wanted)
        else:
            gradients = _gradients(ctx, dy, wanted)
        return (*gradients, *[None] * 7)


def _gradients(ctx: Any, dy: Tensor, wanted: Sequence[bool]) -> Gradients:
    """Of x, residual, weight and bias, as far as they are wanted."""
    x, residual, weight, bias, mean, rstd, count, mask = ctx.saved_tensors
    _, act, negative_slope, group = ctx.arguments
    given = (dy, x, residual, weight, bias, mean, rstd, mask)
    dx = dresidual = dweight = dbias = None
    means = [torch.zeros_like(rstd)] * 2
    if wanted[0] or wanted[2] or wanted[3]:
        sums = _ops.batch_norm_backward_reduce(*given, act, negative_slope)
        if wanted[0]:
            over_all = all_reduce(torch.cat(sums).double(), group) / count
            means = list(over_all.to(rstd.dtype).view(2, -1))
        if wanted[2]:
            dweight = sums[1].to(weight.dtype).view_as(weight)
        if wanted[3]:
            dbias = sums[0].to(bias.dtype).view_as(bias)
    if wanted[0] or (wanted[1] and act != "identity"):
        dx, dresidual = _ops.batch_norm_backward_apply(*given, *means, act, negative_slope)
    if wanted[1] and dresidual is None:
        dresidual = dy  # that of a sum, or of an empty batch
    return dx, dresidual, dweight, dbias


def _differentiable_gradients(ctx: Any, dy: Tensor, wanted: Sequence[bool]) -> Gradients:
    """As ``_gradients``, but differentiable."""
    x, residual, weight, bias, mean, rstd, _, mask = ctx.saved_tensors
    eps, act, negative_slope, group = ctx.arguments
    factor: Any = 1
    if mask is not None:
        # The residual was not kept. The activation is piecewise linear: its slopes, which are its
        # gradient for dy = 1, are constants.
        ones = torch.ones_like(dy)
        given = (ones, x, residual, weight, bias, mean, rstd, mask)
        zeros = torch.zeros_like(rstd)
        with torch.no_grad():
            slopes = _ops.batch_norm_backward_apply(*given, zeros, zeros, act, negative_slope)[1]
        factor = 1 if slopes is None else slopes  # None: an empty batch
        act = "identity"
    with torch.enable_grad():
        # Aliases, so that a tensor that is input and residual gets the gradient of each.
        inputs: list[Any] = [
            None if t is None else t.view_as(t) for t in (x, residual, weight, bias)
        ]
        y, *_ = composite.normalise(
            inputs[0], inputs[1], inputs[2], inputs[3], eps, act, negative_slope, group
        )
        if act == "identity":
            inputs[1] = None
        asked = [t for t, wants in zip(inputs, wanted, strict=True) if wants and t is not None]
        g = dy * factor
        found = iter(torch.autograd.grad(y, asked, g, create_graph=True) if asked else ())
    gradients = [
        next(found) if wants and t is not None else None
        for t, wants in zip(inputs, wanted, strict=True)
    ]
    if wanted[1] and act == "identity":
        gradients[1] = g
    return tuple(gradients)
