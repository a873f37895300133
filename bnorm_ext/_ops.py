"""The operators ``torch.ops.bnorm_ext.*``: loading them, and their fake (meta) implementations.

The schemas stand in ``csrc/bindings.cpp``. A fake implementation says shape, dtype, device and
strides of the outputs; whether the arguments fit is checked by the real ones, in ``csrc/checks.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from ._compat import suggest_memory_format
from ._load import load

_compiled = load()

#: Types of devices that there are kernels for; "meta" computes shapes alone. Tensors elsewhere
#: take native's path.
KERNEL_DEVICES: frozenset[str] = frozenset(
    ()
    if _compiled is None
    else ("cpu", "meta", "cuda")
    if _compiled.has_cuda() and torch.version.cuda
    else ("cpu", "meta")
)


def _dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    # empty_like of a strided x would keep gaps and permutations; the kernels write a dense tensor.
    if x.numel() == 0:
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _output(x: Tensor) -> Tensor:
    """As ``output_like`` in ``csrc/checks.cpp``."""
    return _dense(x, torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x))


def _gradient(x: Tensor) -> Tensor:
    """As ``gradient_like`` in ``csrc/checks.cpp``."""
    return _dense(x, suggest_memory_format(x))


def _format(t: Tensor) -> torch.memory_format:
    return torch.contiguous_format if t.is_contiguous() else suggest_memory_format(t)


def _channels_last_as(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """As ``channels_last_as`` in ``csrc/checks.cpp``."""
    wanted = _format(dy)
    tied = mask is not None and mask.numel() > 0
    if tied or dy.shape != x.shape or wanted in (torch.contiguous_format, _format(x)):
        return x
    if not dy.is_contiguous(memory_format=wanted):
        return x
    return torch.empty_like(x, memory_format=wanted)


def _accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _statistic(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((x.shape[1],), dtype=dtype or _accumulation_type(x.dtype))


_PIECEWISE = ("relu", "relu6", "leaky_relu")


def _mask(x: Tensor, residual: Tensor | None, act: str, save_mask: bool) -> Tensor:
    if not save_mask or residual is None or act not in _PIECEWISE or x.numel() == 0:
        return x.new_empty((0,), dtype=torch.uint8)
    return x.new_empty((_mask_bytes(x),), dtype=torch.uint8)


def _mask_bytes(x: Tensor) -> int:
    """As ``MaskRows`` in ``csrc/cpu/kernels.h``, and ``mask_bytes`` in ``csrc/cuda/mask.h``."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    channels_last = S == 1 or not x.is_contiguous()
    if not x.is_contiguous() and suggest_memory_format(x) == torch.contiguous_format:
        channels_last = S == 1
    if C == 1:
        N, S, channels_last = 1, N * S, False
    if x.device.type == "cuda":
        if channels_last:
            return N * S * ((C + 7) // 8)
        if _takes_groups(C, S, x.dtype.itemsize):
            return N * C * S * x.dtype.itemsize // 16
        return C * ((N * S + 7) // 8)
    if channels_last:
        N, S = N * S, 1
    # Rows of this many bits start at whole bytes.
    row = S if S >= 256 else C * S if C * S >= 128 else N * C * S
    return (N * C * S) // row * ((row + 7) // 8) + 8


def _takes_groups(C: int, S: int, itemsize: int) -> bool:
    """As ``channels_of_group`` in ``csrc/cuda/plan.h``."""
    width = 16 // itemsize
    if itemsize > 4 or width > S or S % width == 0 or S > 2**26:
        return False
    return C % (width // math.gcd(width, S)) == 0


def _same_device(x: Tensor, *others: Tensor | None) -> None:
    # A tensor on the meta device brings the call here although x is real.
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"Tensor on device {other.device} is not on the expected device {x.device}!"
            )


def _training(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str = "identity",
    negative_slope: float = 0.01,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _same_device(x, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    return _output(x), _statistic(x), _statistic(x), _mask(x, residual, act, save_mask)


def _inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    act: str = "identity",
    negative_slope: float = 0.01,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    _same_device(x, residual, weight, bias, running_mean, running_var)
    return _output(x), _mask(x, residual, act, save_mask)


def _gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def of(parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return _statistic(x)
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)

    return (
        _gradient(x) if output_mask[0] else None,
        _gradient(x) if output_mask[1] else None,
        of(weight) if output_mask[2] else None,
        of(bias) if output_mask[3] else None,
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    act: str,
    negative_slope: float,
    output_mask: Sequence[bool],
    any_layout: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    _same_device(x, dy, residual, weight, bias, mean, rstd, mask)
    if any_layout:
        x = _channels_last_as(dy, x, mask)
    return _gradients(x, weight, bias, output_mask)


def _inference_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    mask: Tensor | None,
    act: str,
    negative_slope: float,
    output_mask: Sequence[bool],
    any_layout: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    _same_device(x, dy, residual, weight, bias, running_mean, running_var, mask)
    if any_layout:
        x = _channels_last_as(dy, x, mask)
    return _gradients(x, weight, bias, output_mask)


def _stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _statistic(x, torch.float64), _statistic(x, torch.float64)


def _merge_stats(
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _same_device(mean, var, count, running_mean, running_var, num_batches_tracked)
    acc = _accumulation_type(dtype)
    return _statistic(mean, acc), _statistic(mean, acc)


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str = "identity",
    negative_slope: float = 0.01,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    _same_device(x, residual, weight, bias, mean, rstd)
    return _output(x), _mask(x, residual, act, save_mask)


def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    act: str = "identity",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    _same_device(x, dy, residual, weight, bias, mean, rstd, mask)
    return _statistic(x), _statistic(x)


def _backward_apply(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    act: str = "identity",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor | None]:
    _same_device(x, dy, residual, weight, bias, mean, rstd, mask, mean_dy, mean_dy_xhat)
    return _gradient(x), None if residual is None else _gradient(x)


if _compiled is not None:
    for _name, _fake in {
        "batch_norm_training": _training,
        "batch_norm_inference": _inference,
        "batch_norm_backward": _backward,
        "batch_norm_inference_backward": _inference_backward,
        "batch_norm_stats": _stats,
        "batch_norm_merge_stats": _merge_stats,
        "batch_norm_apply": _apply,
        "batch_norm_backward_reduce": _backward_reduce,
        "batch_norm_backward_apply": _backward_apply,
    }.items():
        register_fake(f"bnorm_ext::{_name}", _fake)
