"""Batch normalisation under functorch transforms and forward-mode derivatives.

functorch cannot transform autograd Functions that are written in C++. While a transform of
``torch.func`` (vmap, grad, jvp, jacfwd, hessian, ...) or forward-mode AD is active, the Python
Functions here take their place. They call the same operators and give the same bits.

With xhat = (x - mean) * rstd and P(v) = v - mean(v) - xhat * mean(v * xhat), where mean(v) is the
mean of each channel (in inference the statistics are constants, and P(v) = v):

    y  = weight * xhat + bias         dxhat = rstd * P(dx)
    gradients of y: x: weight * rstd * P(dy)    weight: sum(dy * xhat)    bias: sum(dy)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _compat, _refusals
from ._decompositions import Normalised, accumulation_type, fold, fold_vector, per_channel, unfold
from .activations import check_residual, compose


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    act: str,
    negative_slope: float,
) -> Tensor:
    """As ``functional.batch_norm``."""
    buffers = (running_mean, running_var, num_batches_tracked)
    if residual is None and act == "identity":
        return _normalise(input, weight, bias, *buffers, training, momentum, eps)
    # What follows the normalisation is torch's own: it has every derivative. In the accumulation
    # type, so that 16-bit results are rounded once here too; but for running statistics in 16 bit,
    # which the operator updates for 16-bit input only.
    type = accumulation_type(input.dtype)
    if any(t is not None and t.dtype != type for t in buffers[:2]):
        type = input.dtype
    wide = [t if t is None else t.to(type) for t in (input, weight, bias)]
    z = _normalise(*wide, *buffers, training, momentum, eps)
    if residual is not None:
        check_residual(input, residual)
        residual = residual.to(type)
    return compose(z, residual, act, negative_slope).to(input.dtype)


def _normalise(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    counter = num_batches_tracked if training else None
    y, mean, rstd = _forward(
        input, weight, bias, running_mean, running_var, counter, training, momentum, eps
    )
    if not _compat.may_be_forward_over_forward():
        return y
    # Torch (2.11 to 2.13 at least) loses the outer tangent in the jvp of any Python Function: the
    # second forward derivative of x**3 written as one is 0. Plain operations have no such trouble.
    n = Normalised(input, mean, rstd, training, eps)
    y = n.xhat * per_channel(weight, input)
    return (y if bias is None else y + per_channel(bias, input)).to(input.dtype)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`_Forward`, which itself would take buffers that require gradients for constants."""
    _refusals.gradients(*args[3:5])
    return _Forward.apply(*args)


class _Forward(torch.autograd.Function):
    """(x, weight, bias) -> y; also mean and rstd, not differentiable. Updates the buffers."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops = torch.ops.bnorm_ext
        if training:
            y, mean, rstd, _ = ops.batch_norm_training(
                x, None, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
            )
            return y, mean, rstd
        y, _ = ops.batch_norm_inference(x, None, weight, bias, running_mean, running_var, eps)
        assert running_mean is not None and running_var is not None  # or the operator has raised
        # In double and rounded once, as the operator does it; a copy, since a Function must not
        # return its inputs.
        mean = running_mean.to(accumulation_type(x.dtype), copy=True)
        rstd = (1.0 / torch.sqrt(running_var.double() + eps)).to(accumulation_type(x.dtype))
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _, _, ctx.training, _, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        gradients: Any = (None, None, None)
        if dy is not None:
            wanted = ctx.needs_input_grad[:3]
            gradients = _Backward.apply(dy, *ctx.saved_tensors, ctx.training, ctx.eps, wanted)
        return (*gradients, *[None] * 6)

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        drunning_mean: Tensor | None,
        drunning_var: Tensor | None,
        *_: Any,
    ) -> Any:
        if not ctx.training:
            _refusals.tangents((dx, dweight, dbias), (drunning_mean, drunning_var))
        x, weight, _, mean, rstd = ctx.saved_tensors
        if dx is None and dweight is None and dbias is None:
            return None, None, None
        n = Normalised(x, mean, rstd, ctx.training, ctx.eps)
        dy = torch.zeros_like(n.xhat)
        if dx is not None:
            dy = dy + per_channel(weight, x) * n.rstd * n.project(dx.to(dy.dtype))
        if dweight is not None:
            dy = dy + per_channel(dweight, x) * n.xhat
        if dbias is not None:
            dy = dy + per_channel(dbias, x)
        return dy.to(x.dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, _, _, *buffers, training, momentum, eps = args
        B = info.batch_size
        counter = buffers[2]
        # Where nothing that they are updated by is mapped, shared buffers are updated once.
        if training and (in_dims[0] is not None or (momentum is None and in_dims[5] is not None)):
            _refusals.shared_buffers(buffers, in_dims[3:6])
        if momentum is None and counter is not None:
            # Each of the B batch norms has its own count, hence its own momentum.
            slices = [
                [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
                for i in range(B)
            ]
            outputs = [_forward(*one) for one in slices]
            return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0, 0, 0)
        folded = [fold_vector(t, d, B) for t, d in zip(args[1:5], in_dims[1:5], strict=True)]
        y, mean, rstd = _forward(fold(x, in_dims[0], B), *folded, None, training, momentum, eps)
        if training:
            for t, new, d in zip(buffers[:2], folded[2:], in_dims[3:5], strict=True):
                if t is not None:
                    all_new = new.reshape(B, -1)
                    t.copy_(all_new[0]) if d is None else t.movedim(d, 0).copy_(all_new)
            if counter is not None:
                counter.add_(1)
        return (unfold(y, B), mean.reshape(B, -1), rstd.reshape(B, -1)), (1, 0, 0)


class _Backward(torch.autograd.Function):
    """(dy, x, weight) -> (dx, dweight, dbias), each None if not wanted. In training mean and rstd
    are functions of x, in inference constants."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        training: bool,
        eps: float,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ops = torch.ops.bnorm_ext
        given = (dy, x, None, weight, bias, mean, rstd, None)
        if training:
            mask = (wanted[0], False, wanted[1], wanted[2])
            dx, _, dweight, dbias = ops.batch_norm_backward(*given, "identity", 0.0, mask)
            return dx, dweight, dbias
        # What batch_norm_inference_backward does, for statistics in this form.
        scale = per_channel(weight, x) * per_channel(rstd, x)
        dx = (dy.to(mean.dtype) * scale).to(x.dtype) if wanted[0] else None
        if not (wanted[1] or wanted[2]):
            return dx, None, None
        dbias, dweight = ops.batch_norm_backward_reduce(*given)
        return (
            dx,
            (dweight if weight is None else dweight.to(weight.dtype)) if wanted[1] else None,
            (dbias if bias is None else dbias.to(bias.dtype)) if wanted[2] else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        dy, x, weight, bias, mean, rstd, ctx.training, ctx.eps, ctx.wanted = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        ctx.save_for_forward(dy, x, weight, mean, rstd)

    @staticmethod
    def backward(
        ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
    ) -> Any:
        """The gradients of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>, as
        csrc/double_backward.cpp computes them in C++."""
        dy, x, weight, mean, rstd = ctx.saved_tensors
        n = Normalised(x, mean, rstd, ctx.training, ctx.eps)
        g = dy.to(n.xhat.dtype)
        scale, p_dy = per_channel(weight, x) * n.rstd, n.project(g)
        zero = torch.zeros_like(n.xhat)
        g_dy, g_x, g_weight = zero, zero, None
        if ddx is not None:
            a = ddx.to(n.xhat.dtype)
            g_dy = g_dy + scale * n.project(a)
            if ctx.training:
                g_x = g_x - scale * n.rstd * (
                    n.xhat * n.average(a * p_dy)
                    + n.project(a) * n.average(g * n.xhat)
                    + p_dy * n.average(a * n.xhat)
                )
            if weight is not None:
                g_weight = (a * n.rstd * p_dy).sum(n.dims).to(weight.dtype)
        if ddweight is not None:
            b = per_channel(ddweight, x)
            g_dy = g_dy + b * n.xhat
            g_x = g_x + b * n.rstd * p_dy
        if ddbias is not None:
            g_dy = g_dy + per_channel(ddbias, x)
        return (g_dy.to(dy.dtype), g_x.to(x.dtype), g_weight, *[None] * 6)

    @staticmethod
    def jvp(
        ctx: Any, ddy: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: Any
    ) -> Any:
        """The tangents of the results (dx, dweight, dbias), here t_dx and so on. The arguments
        ddy, dx and dweight are the tangents of dy, x and weight."""
        dy, x, weight, mean, rstd = ctx.saved_tensors
        n = Normalised(x, mean, rstd, ctx.training, ctx.eps)
        acc = n.xhat.dtype
        g, w = dy.to(acc), per_channel(weight, x)
        p_g = n.project(g)
        t_dx = torch.zeros_like(n.xhat)
        t_dweight = torch.zeros_like(mean)
        t_dbias = torch.zeros_like(mean)
        if ddy is not None:
            v = ddy.to(acc)
            t_dx = t_dx + w * n.rstd * n.project(v)
            t_dweight = t_dweight + (v * n.xhat).sum(n.dims)
            t_dbias = t_dbias + v.sum(n.dims)
        if dx is not None:
            v = dx.to(acc)
            t_xhat = n.rstd * n.project(v)
            if ctx.training:
                t_rstd = -n.rstd * n.rstd * n.average(n.xhat * v)
                t_project = -t_xhat * n.average(g * n.xhat) - n.xhat * n.average(g * t_xhat)
                t_dx = t_dx + w * (t_rstd * p_g + n.rstd * t_project)
            t_dweight = t_dweight + (g * t_xhat).sum(n.dims)
        if dweight is not None:
            t_dx = t_dx + per_channel(dweight, x) * n.rstd * p_g
        types = (x.dtype, acc if weight is None else weight.dtype, ctx.bias_dtype or acc)
        return tuple(
            v.to(dtype) if wanted else None
            for v, dtype, wanted in zip((t_dx, t_dweight, t_dbias), types, ctx.wanted, strict=True)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        B = info.batch_size
        dy, x = (fold(t, d, B) for t, d in zip(args[:2], in_dims[:2], strict=True))
        vectors = [fold_vector(t, d, B) for t, d in zip(args[2:6], in_dims[2:6], strict=True)]
        dx, dweight, dbias = _Backward.apply(dy, x, *vectors, *args[6:])
        return (
            None if dx is None else unfold(dx, B),
            None if dweight is None else dweight.reshape(B, -1),
            None if dbias is None else dbias.reshape(B, -1),
        ), (1, 0, 0)
