"""Reference implementation of batch normalisation: basic torch operations in float64.

Written to be simple, not fast, and independent of the compiled extension. The tests and the
benchmark measure the error of every implementation, native's too, against this one.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ForwardReference(NamedTuple):
    """Results of the forward pass, all float64. ``mean`` and ``var`` are the statistics that were
    used: those of the batch, or the running ones."""

    y: Tensor  #: (N, C, ...)
    mean: Tensor  #: (C,)
    var: Tensor  #: (C,), biased
    rstd: Tensor  #: (C,), 1 / sqrt(var + eps)
    running_mean: Tensor | None  #: (C,), after the step
    running_var: Tensor | None  #: (C,), after the step, updated with the unbiased variance


class BackwardReference(NamedTuple):
    """Gradients, all float64."""

    dx: Tensor  #: (N, C, ...)
    dweight: Tensor  #: (C,)
    dbias: Tensor  #: (C,)


class _Normalised(NamedTuple):
    xhat: Tensor  # (N, C, ...)
    mean: Tensor  # (1, C, 1, ...), like the next two
    var: Tensor
    rstd: Tensor


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    """(C,), or any shape of C elements, in float64 as (1, C, 1, ...)."""
    return t.detach().double().reshape(1, -1, *[1] * (x.dim() - 2))


def _sum(t: Tensor, careful: bool) -> Tensor:
    """(N, C, ...) -> (C,). Careful: with what the additions round off (Knuth's TwoSum), because to
    results in float64 a plain sum of thousands of values is no reference."""
    if not careful or t.numel() == 0:
        return t.sum(_dims(t))
    t = t.transpose(0, 1).flatten(1)
    lost = torch.zeros_like(t[:, 0])
    while t.shape[1] > 1:
        half = t.shape[1] // 2
        a, b, rest = t[:, :half], t[:, half : 2 * half], t[:, 2 * half :]
        s = a + b
        part = s - a
        lost = lost + ((a - (s - part)) + (b - part)).sum(1)
        t = torch.cat([s, rest], 1)
    # Where a value is infinite, what it has lost is NaN.
    return t[:, 0] + lost.where(lost.isfinite(), 0)


def _mean(t: Tensor, careful: bool) -> Tensor:
    """(N, C, ...) -> (1, C, 1, ...)"""
    return _per_channel(_sum(t, careful) / (t.numel() / t.shape[1]), t)


def _normalise(
    x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float, careful: bool
) -> _Normalised:
    """Normalises by the given statistics or, if they are None, by those of the batch."""
    x = x.detach().double()
    if mean is None or var is None:
        # The mean is subtracted in two parts. A mean that is much larger than the deviations would
        # otherwise be rounded to float64 first, and for float64 input that error matters.
        shift = _mean(x, careful)
        rest = _mean(x - shift, careful)
        centred = (x - shift) - rest
        m = shift + rest
        v = _mean(centred.square(), careful)
    else:
        m, v = _per_channel(mean, x), _per_channel(var, x)
        centred = x - m
    rstd = 1 / torch.sqrt(v + eps)
    return _Normalised(centred * rstd, m, v, rstd)


def batch_norm_reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    careful: bool = False,
) -> ForwardReference:
    """The forward pass: ``y = (x - mean) * rstd * weight + bias`` per channel (arXiv:1502.03167,
    algorithm 1).

    Args:
        x: (N, C, ...); the other tensors are (C,).
        training: whether to normalise by the statistics of the batch.
        momentum: weight of the batch in the new running statistics. For a cumulative average it is
            1 / (number of batches, this one included).
        careful: whether sums are exact to the last bit or two, for results in float64; slower.

    Returns:
        The results, with the new running statistics; no argument is changed.
    """
    statistics = (None, None) if training else (running_mean, running_var)
    n = _normalise(x, *statistics, eps, careful)
    y = n.xhat
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    mean, var = n.mean.flatten(), n.var.flatten()
    moved = [None if t is None else t.detach().double() for t in (running_mean, running_var)]
    if training:
        count = x.numel() / x.shape[1]
        for i, batch in enumerate((mean, var * count / (count - 1))):
            t = moved[i]
            moved[i] = None if t is None else momentum * batch + (1 - momentum) * t
    return ForwardReference(y, mean, var, n.rstd.flatten(), *moved)


def batch_norm_backward_reference(
    dy: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    *,
    careful: bool = False,
) -> BackwardReference:
    """The gradients for dy (N, C, ...), from the arguments of the forward pass.

    In training the statistics depend on x, which gives the two projections; in inference they are
    constants.
    """
    statistics = (None, None) if training else (running_mean, running_var)
    n = _normalise(x, *statistics, eps, careful)
    dy = dy.detach().double()
    dx = dy
    if training:
        along_mean = _mean(dy, careful)
        along_xhat = _mean(dy * n.xhat, careful)
        dx = dy - along_mean - n.xhat * along_xhat
    dx = dx * n.rstd
    if weight is not None:
        dx = dx * _per_channel(weight, x)
    return BackwardReference(dx, _sum(dy * n.xhat, careful), _sum(dy, careful))
