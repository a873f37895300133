"""The operators ``torch.ops.bnorm_ext.*``: loading them, and their fake (meta) implementations.

The schemas are in ``csrc/bindings.cpp``. A fake implementation says shape, dtype, device and
strides of the outputs; whether the arguments fit is checked by the real ones, in ``csrc/checks.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake
from torch.nn import Parameter

from ._compat import suggest_memory_format
from ._cuda import notice_processes
from ._load import load
from .activations import PIECEWISE, check_residual

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

#: Those of them of which a device may have no code in this build: each is asked (`_cuda.has_code`).
ASKED_DEVICES: frozenset[str] = KERNEL_DEVICES & {"cuda"}


def _dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    # empty_like of a strided x would keep gaps and permutations; the kernels write a dense tensor.
    if x.numel() == 0:
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


_FORMATS = (torch.contiguous_format, torch.channels_last_3d, torch.channels_last)


def _format(t: Tensor) -> torch.memory_format:
    """As ``format_of`` in ``csrc/tensors.cpp``."""
    for memory_format in _FORMATS:
        if t.is_contiguous(memory_format=memory_format):
            return memory_format
    return suggest_memory_format(t)


def _output(x: Tensor) -> Tensor:
    """As ``output_like`` in ``csrc/tensors.cpp``."""
    return _dense(x, _format(x))


def _gradient(x: Tensor, dy: Tensor) -> Tensor:
    """As ``gradient_like`` in ``csrc/tensors.cpp``."""
    suggested = suggest_memory_format(x)
    dense = dy.is_contiguous(memory_format=_format(dy))
    alike = dense and suggest_memory_format(dy) == suggested
    return _dense(x, suggested if x.is_contiguous() and not alike else _format(x))


def _channels_last_as(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """As ``channels_last_as`` in ``csrc/tensors.cpp``."""
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


def _mean(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As ``mean_like`` in ``csrc/tensors.cpp``."""
    return x.new_empty((2, x.shape[1]), dtype=dtype or _accumulation_type(x.dtype))


def _mask(a: SimpleNamespace) -> Tensor:
    wanted = a.save_mask and a.residual is not None and a.act in PIECEWISE and a.x.numel() != 0
    mask: Tensor = a.x.new_empty((_mask_bytes(a.x) if wanted else 0,), dtype=torch.uint8)
    return mask


def _mask_bytes(x: Tensor) -> int:
    """As ``MaskRows`` in ``csrc/cpu/plan.h``, and ``mask_bytes`` in ``csrc/cuda/mask.h``."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    channels_last = S == 1 or _format(x) != torch.contiguous_format
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


def _gradients(a: SimpleNamespace) -> tuple[Tensor | None, ...]:
    x = _channels_last_as(a.dy, a.x, a.mask) if a.any_layout else a.x

    def of(parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return _statistic(x)
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)

    return (
        _gradient(x, a.dy) if a.output_mask[0] else None,
        _gradient(x, a.dy) if a.output_mask[1] else None,
        of(a.weight) if a.output_mask[2] else None,
        of(a.bias) if a.output_mask[3] else None,
    )


def _gradient_of_residual(a: SimpleNamespace) -> Tensor | None:
    masked = a.mask is not None and a.mask.numel() > 0
    return None if a.residual is None and not masked else _gradient(a.x, a.dy)


def _merged(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    acc = _accumulation_type(a.dtype)
    return _mean(a.mean, acc), _statistic(a.mean, acc)


#: The fakes, of the operator's arguments by the names that the schema gives them.
_FAKES: dict[str, Callable[[SimpleNamespace], tuple[Tensor | None, ...]]] = {
    "batch_norm_training": lambda a: (_output(a.x), _mean(a.x), _statistic(a.x), _mask(a)),
    "batch_norm_inference": lambda a: (_output(a.x), _mask(a)),
    "batch_norm_backward": _gradients,
    "batch_norm_stats": lambda a: (_statistic(a.x, torch.double), _statistic(a.x, torch.double)),
    "batch_norm_merge_stats": _merged,
    "batch_norm_apply": lambda a: (_output(a.x), _mask(a)),
    "batch_norm_backward_reduce": lambda a: (_statistic(a.x), _statistic(a.x)),
    "batch_norm_backward_apply": lambda a: (_gradient(a.x, a.dy), _gradient_of_residual(a)),
}


def _same_device(x: Tensor, others: Iterable[Any]) -> None:
    # A tensor on the meta device brings the call here although x is real.
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise RuntimeError(
                f"Tensor on device {other.device} is not on the expected device {x.device}!"
            )


#: What native has too.
_FORWARD = ("batch_norm_training", "batch_norm_inference")


def _check_on_meta(a: SimpleNamespace) -> None:
    """Refuses what native refuses on the meta device, where no kernel does."""
    training = hasattr(a, "num_batches_tracked")
    mean, var = (None if t is None else t.detach().clone() for t in (a.running_mean, a.running_var))
    with torch.no_grad():
        F.batch_norm(a.x, mean, var, a.weight, a.bias, training, 0.1, a.eps)
    if a.residual is not None:
        check_residual(a.x, a.residual)


def _register(name: str, fake: Callable[[SimpleNamespace], tuple[Tensor | None, ...]]) -> None:
    parameters = getattr(torch.ops.bnorm_ext, name).default._schema.arguments
    names = [p.name for p in parameters]
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}

    def by_name(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        # Torch leaves out arguments that have their default value.
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        of = given["x"] if "x" in given else given["mean"]
        _same_device(of, given.values())
        if of.device.type in ASKED_DEVICES:
            notice_processes()  # a graph is being compiled
        call = SimpleNamespace(**given)
        if name in _FORWARD and of.device.type == "meta" and type(of) in (Tensor, Parameter):
            _check_on_meta(call)
        return fake(call)

    register_fake(f"bnorm_ext::{name}", by_name)


if _compiled is not None:
    for _name, _fake in _FAKES.items():
        _register(_name, _fake)
