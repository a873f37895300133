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
from torch.autograd import forward_ad

from . import _compat, _refusals
from ._arguments import Arguments
from ._decompositions import (
    Normalised,
    accumulation_type,
    fold,
    fold_mean,
    fold_vector,
    per_channel,
    unfold,
)
from .activations import check_residual, compose


def batch_norm(call: Arguments) -> Tensor:
    """As ``functional.batch_norm``."""
    input, residual = call.input, call.residual
    if residual is None and call.act == "identity":
        return _normalise(call)
    # Addition and activation are torch's own operations, which have every derivative. They are done
    # in the accumulation type, so that 16-bit results are rounded only once, as in the operator.
    # Not with 16-bit running statistics, which the operator updates for 16-bit input only.
    type = accumulation_type(input.dtype)
    if any(t is not None and t.dtype != type for t in (call.running_mean, call.running_var)):
        type = input.dtype
    weight, bias = (t if t is None else t.to(type) for t in (call.weight, call.bias))
    z = _normalise(call._replace(input=input.to(type), weight=weight, bias=bias))
    if residual is not None:
        check_residual(input, residual)
        residual = residual.to(type)
    return compose(z, residual, call.act, call.negative_slope).to(input.dtype)


def _normalise(call: Arguments) -> Tensor:
    """The batch norm alone, without addition and activation."""
    input, weight, bias = call.input, call.weight, call.bias
    if not call.training:
        call = call._replace(num_batches_tracked=None)
    y, mean, rstd = _forward(*call[:9])
    if not _compat.may_be_forward_over_forward():
        return y
    # In nested jvp, torch (2.11 to 2.13 at least) loses the outer tangent of any Python Function:
    # the second forward derivative of x**3, written as a Function, is 0. So y is computed by basic
    # operations here.
    n = Normalised(input, mean, rstd, call.training, call.eps)
    y = n.xhat * per_channel(weight, input)
    shifted: Tensor = y if bias is None else y + per_channel(bias, input)
    return shifted.to(input.dtype)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Calls `_Forward`. Buffers that require gradients are refused here, because `_Forward` would
    treat them as constants."""
    _refusals.gradients(*args[1:3])
    if not _compat.transforms_active() and not any(map(_has_tangent, (args[0], *args[3:5]))):
        # Native ignores tangents of running statistics alone. A Function would return a tangent of
        # zeros, because torch does not let it return none.
        args = (args[0], *map(_without_tangent, args[1:3]), *args[3:])
    outputs: tuple[Tensor, Tensor, Tensor] = _Forward.apply(*args)
    return outputs


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _without_tangent(t: Tensor | None) -> Tensor | None:
    """The tensor, or an alias of it where it has a tangent."""
    return forward_ad.unpack_dual(t).primal if t is not None and _has_tangent(t) else t


class _Forward(torch.autograd.Function):
    """(x, weight, bias) -> (y, mean, rstd); only y is differentiable. In training it updates the
    running statistics and the counter in place.

    The inputs are the first nine of `Arguments`, in their order. They are separate arguments,
    because torch does not look for tensors inside of tuples.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        a = Arguments(*args)
        ops, given = torch.ops.bnorm_ext, (a.input, None, a.weight, a.bias)
        buffers = (a.running_mean, a.running_var)
        if a.training:
            y, mean, rstd, _ = ops.batch_norm_training(
                *given, *buffers, a.num_batches_tracked, a.momentum, a.eps
            )
            return y, mean, rstd
        y, _ = ops.batch_norm_inference(*given, *buffers, a.eps)
        # Otherwise the operator has raised.
        assert a.running_mean is not None and a.running_var is not None
        # rstd is computed in float64 and rounded once, as the operator does. mean is a copy,
        # because a Function must not return its inputs.
        mean = a.running_mean.to(accumulation_type(a.input.dtype), copy=True)
        rstd = 1.0 / torch.sqrt(a.running_var.double() + a.eps)
        return y, mean, rstd.to(accumulation_type(a.input.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a = Arguments(*inputs)
        ctx.training, ctx.eps = a.training, a.eps
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a.input, a.weight, a.bias, mean, rstd)
        ctx.save_for_forward(a.input, a.weight, a.bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        dx, dweight, dbias = None, None, None
        if dy is not None:
            needed = Arguments(*ctx.needs_input_grad)
            wanted = (needed.input, needed.weight, needed.bias)
            dx, dweight, dbias = _Backward.apply(
                dy, *ctx.saved_tensors, ctx.training, ctx.eps, wanted
            )
        return dx, None, None, dweight, dbias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t = Arguments(*tangents)
        dx, dweight, dbias = t.input, t.weight, t.bias
        if not ctx.training:
            _refusals.tangents((dx, dweight, dbias), (t.running_mean, t.running_var))
        x, weight, _, mean, rstd = ctx.saved_tensors
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
        a, B = Arguments(*args), info.batch_size
        dims: Any = Arguments(*in_dims)  # a dimension, or None, in place of each argument
        counter = a.num_batches_tracked
        # Buffers may be shared only if all that determines their update is shared too.
        own_momentum = a.momentum is None and dims.num_batches_tracked is not None
        if a.training and (dims.input is not None or own_momentum):
            _refusals.shared_buffers(
                (a.running_mean, a.running_var, counter),
                (dims.running_mean, dims.running_var, dims.num_batches_tracked),
            )
        if a.momentum is None and counter is not None:
            # Each of the B batch norms has its own count and so its own momentum.
            slices = [
                [t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True)]
                for i in range(B)
            ]
            outputs = [_forward(*one) for one in slices]
            return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0, 0, 0)
        folded = [fold_vector(t, d, B) for t, d in zip(args[1:5], in_dims[1:5], strict=True)]
        y, mean, rstd = _forward(
            fold(a.input, dims.input, B), *folded, a.training, a.momentum, a.eps, None
        )
        if a.training:
            for t, new, d in zip(args[1:3], folded[:2], in_dims[1:3], strict=True):
                if t is not None and new is not None:
                    all_new = new.reshape(B, -1)
                    t.copy_(all_new[0]) if d is None else t.movedim(d, 0).copy_(all_new)
            if counter is not None:
                counter.add_(1)
        means = mean.unflatten(-1, (B, -1))
        return (unfold(y, B), means, rstd.reshape(B, -1)), (1, means.dim() - 2, 0)


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
        given = (dy, x, None, weight, bias)
        if training:
            dx, _, dweight, dbias = ops.batch_norm_backward(
                *(*given, None, None, mean, rstd, True, eps),
                *(None, "identity", 0.0, (wanted[0], False, wanted[1], wanted[2])),
            )
            return dx, dweight, dbias
        # What batch_norm_backward does with train=False, for statistics in this form.
        scale = per_channel(weight, x) * per_channel(rstd, x)
        dx = (dy.to(mean.dtype) * scale).to(x.dtype) if wanted[0] else None
        if not (wanted[1] or wanted[2]):
            return dx, None, None
        dbias, dweight = ops.batch_norm_backward_reduce(*given, mean, rstd, None)
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
        t_dweight = torch.zeros_like(rstd)
        t_dbias = torch.zeros_like(rstd)
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
        weight, bias, rstd = (fold_vector(args[i], in_dims[i], B) for i in (2, 3, 5))
        mean = fold_mean(args[4], in_dims[4], B)
        dx, dweight, dbias = _Backward.apply(dy, x, weight, bias, mean, rstd, *args[6:])
        return (
            None if dx is None else unfold(dx, B),
            None if dweight is None else dweight.reshape(B, -1),
            None if dbias is None else dbias.reshape(B, -1),
        ), (1, 0, 0)
