"""Batch normalisation under functorch transforms and forward-mode derivatives.

C++ autograd Functions cannot be transformed, so these Python ones take their place while
``torch.func`` (vmap, grad, jvp, jacfwd, hessian, ...) or forward AD is at work. They call the same
operators and give the same bits.

With xhat = (x - mean) * rstd and P(v) = v - mean(v) - xhat * mean(v * xhat), means over all but the
channels (in inference, where the statistics are constants, P(v) = v):

    y  = weight * xhat + bias         dxhat = rstd * P(dx)
    gradients of y: x: weight * rstd * P(dy)    weight: sum(dy * xhat)    bias: sum(dy)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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
) -> Tensor:
    """As ``functional.batch_norm``; the buffers change by plain operations that transforms see."""
    if not training:
        y, _, _, _, _ = _Forward.apply(input, weight, bias, running_mean, running_var, False, eps)
        return y
    if momentum is None and num_batches_tracked is None and running_mean is not None:
        raise TypeError("momentum=None needs num_batches_tracked")
    # The checks of running statistics need their dtype and size, not their values.
    y, _, _, mean, var = _Forward.apply(input, weight, bias, running_mean, running_var, True, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        # In double and in this order: the bits of RunningStatistics in csrc/cpu/batch_norm.cpp.
        m: Any = 1.0 / num_batches_tracked.double() if momentum is None else momentum  # type: ignore[union-attr]  # checked above
        count = input.numel() / input.shape[1]
        unbiased = var * (count / (count - 1))
        running_mean.copy_(m * mean + (1 - m) * running_mean.detach().double())
        running_var.copy_(m * unbiased + (1 - m) * running_var.detach().double())
    return y


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(t: Tensor | None, like: Tensor) -> Tensor | float:
    """(C,) as (1, C, 1, ...) in the accumulation type of ``like``."""
    if t is None:
        return 1.0
    return t.to(_acc(like.dtype)).reshape(1, -1, *[1] * (like.dim() - 2))


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _Normalised:
    """x normalised in plain torch: what the derivatives of the Functions are made of."""

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, training: bool) -> None:
        self.dims = _dims(x)
        self.training = training
        self.rstd = _per_channel(rstd, x)
        self.xhat = (x.to(_acc(x.dtype)) - _per_channel(mean, x)) * self.rstd

    def average(self, v: Tensor) -> Tensor:
        return v.mean(self.dims, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        if not self.training:
            return v
        return v - self.average(v) - self.xhat * self.average(v * self.xhat)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


class _Forward(torch.autograd.Function):
    """(x, weight, bias) -> y; also mean, rstd and, in double, mean and var, not differentiable."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ops = torch.ops.bnorm_ext
        acc = _acc(x.dtype)
        if not training:
            y, _ = ops.batch_norm_inference(
                x, None, weight, bias, running_mean, running_var, eps
            )
            assert running_mean is not None and running_var is not None  # or the operator raised
            mean, var = running_mean.double(), running_var.double()
            return y, mean.to(acc), (1.0 / torch.sqrt(var + eps)).to(acc), mean, var
        # On copies: the operator checks the buffers, the caller updates them.
        buffers = [t if t is None else t.clone() for t in (running_mean, running_var)]
        y, mean, rstd, _ = ops.batch_norm_training(
            x, None, weight, bias, *buffers, None, 0.0, eps
        )
        return y, mean, rstd, *ops.batch_norm_stats(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _, ctx.training, _ = inputs
        _, mean, rstd, mean64, var64 = output
        ctx.mark_non_differentiable(mean, rstd, mean64, var64)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None, None, None
        dx, dweight, dbias = _Backward.apply(
            dy, x, weight, bias, mean, rstd, ctx.training, ctx.needs_input_grad[:3]
        )
        return dx, dweight, dbias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: Any) -> Any:
        x, weight, _, mean, rstd = ctx.saved_tensors
        dy: Tensor | None = None
        if dx is not None:
            # P is symmetric: the tangent is the gradient with dx in the place of dy.
            dy = _Backward.apply(
                dx.to(x.dtype), x, weight, None, mean, rstd, ctx.training, (True, False, False)
            )[0]
        n = _Normalised(x, mean, rstd, ctx.training)
        if dweight is not None:
            dy = _add(dy, (_per_channel(dweight, x) * n.xhat).to(x.dtype))
        if dbias is not None:
            dy = _add(dy, (_per_channel(dbias, x) * torch.ones_like(n.xhat)).to(x.dtype))
        return (torch.zeros_like(x) if dy is None else dy), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, weight, bias, running_mean, running_var, training, eps = args
        B = info.batch_size
        fold = _Fold(B, x, in_dims[0])
        # An unbatched buffer is only read here; the caller's update raises, as native does.
        vectors = [fold.vector(t, d) for t, d in zip(args[1:5], in_dims[1:5], strict=True)]
        y, *statistics = _Forward.apply(fold.tensor(x, in_dims[0]), *vectors, training, eps)
        return (fold.unfold(y), *(s.reshape(B, -1) for s in statistics)), (1, 0, 0, 0, 0)


class _Backward(torch.autograd.Function):
    """(dy, x, weight) -> (dx, dweight, dbias), None where not wanted; mean and rstd as functions of
    x in training, as constants otherwise."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        training: bool,
        wanted: tuple[bool, bool, bool],
    ) -> _Gradients:
        ops = torch.ops.bnorm_ext
        mask = (wanted[0], False, wanted[1], wanted[2])
        if training:
            dx, _, dweight, dbias = ops.batch_norm_backward(
                dy, x, None, weight, bias, mean, rstd, None, "identity", 0.0, mask
            )
        else:
            zero = torch.zeros_like(mean)
            dx, _ = ops.batch_norm_backward_apply(
                dy, x, None, weight, bias, mean, rstd, None, zero, zero
            )
            dbias, dweight = ops.batch_norm_backward_reduce(
                dy, x, None, weight, bias, mean, rstd, None
            )
            dx = dx if wanted[0] else None
            dweight = dweight.to(dweight.dtype if weight is None else weight.dtype)
            dbias = dbias.to(dbias.dtype if bias is None else bias.dtype)
        return dx, dweight if wanted[1] else None, dbias if wanted[2] else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
        dy, x, weight, bias, mean, rstd, ctx.training, ctx.wanted = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        ctx.save_for_forward(dy, x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None) -> Any:
        dy, x, weight, mean, rstd = ctx.saved_tensors
        gradients = torch.ops.bnorm_ext.batch_norm_double_backward(
            ddx, ddweight, ddbias, dy, x, weight, mean, rstd, ctx.training, ctx.needs_input_grad[:3]
        )
        return (*gradients, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, ddy: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: Any) -> Any:
        """Tangents of (dx, dweight, dbias) for tangents ddy, dx, dweight of (dy, x, weight)."""
        dy, x, weight, mean, rstd = ctx.saved_tensors
        n = _Normalised(x, mean, rstd, ctx.training)
        acc = _acc(x.dtype)
        g, w = dy.to(acc), _per_channel(weight, x)
        p_g = n.project(g)
        t_dx = t_dweight = t_dbias = None
        if ddy is not None:
            t_dx = w * n.rstd * n.project(ddy.to(acc))
            t_dweight = (ddy * n.xhat).sum(n.dims)
            t_dbias = ddy.to(acc).sum(n.dims)
        if dx is not None:
            v = dx.to(acc)
            t_xhat = n.rstd * n.project(v)
            if ctx.training:
                t_rstd = -n.rstd * n.rstd * n.average(n.xhat * v)
                t_project = -t_xhat * n.average(g * n.xhat) - n.xhat * n.average(g * t_xhat)
                t_dx = _add(t_dx, w * (t_rstd * p_g + n.rstd * t_project))
            t_dweight = _add(t_dweight, (g * t_xhat).sum(n.dims))
        if dweight is not None:
            t_dx = _add(t_dx, _per_channel(dweight, x) * n.rstd * p_g)
        types = (x.dtype, x.dtype if weight is None else weight.dtype, acc)
        shapes = (x, mean, mean)
        return tuple(
            None if not wanted else torch.zeros_like(like, dtype=t) if v is None else v.to(t)
            for v, wanted, t, like in zip(
                (t_dx, t_dweight, t_dbias), ctx.wanted, types, shapes, strict=True
            )
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        dy, x, weight, bias, mean, rstd, training, wanted = args
        B = info.batch_size
        fold = _Fold(B, x, in_dims[1])
        vectors = [fold.vector(t, d) for t, d in zip(args[2:6], in_dims[2:6], strict=True)]
        dx, dweight, dbias = _Backward.apply(
            fold.tensor(dy, in_dims[0]), fold.tensor(x, in_dims[1]), *vectors, training, wanted
        )
        return (
            None if dx is None else fold.unfold(dx),
            None if dweight is None else dweight.reshape(B, -1),
            None if dbias is None else dbias.reshape(B, -1),
        ), (1, 0, 0)


class _Fold:
    """Folds a mapped dimension of size B into the channels: batch norm of (N, B * C, ...) is B batch
    norms of (N, C, ...)."""

    def __init__(self, B: int, x: Tensor, dim: int | None) -> None:
        self.B = B

    def tensor(self, x: Tensor, dim: int | None) -> Tensor:
        x = x.unsqueeze(1).expand(-1, self.B, *[-1] * (x.dim() - 1)) if dim is None else x.movedim(dim, 1)
        return x.flatten(1, 2)

    def vector(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        t = t.unsqueeze(0).expand(self.B, *[-1] * t.dim()) if dim is None else t.movedim(dim, 0)
        return t.reshape(-1)

    def unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.B, -1))
