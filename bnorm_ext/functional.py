"""Batch normalisation as a function.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv:1502.03167.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter

from . import _transforms
from ._arguments import Arguments
from ._compat import FORWARD_LEVEL, FORWARD_STATE, transforms_active
from ._ops import KERNEL_DEVICES
from .activations import Activation, check_residual, compose, resolve

# Looked up once: this function is host-bound for small tensors.
_ops = torch.ops.bnorm_ext
_training_op: Any = _ops.batch_norm_training.default if KERNEL_DEVICES else None
_inference_op: Any = _ops.batch_norm_inference.default if KERNEL_DEVICES else None
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
# What a compiled graph holds: "op", this package's operators; "aten", torch's own, which the
# compiler fuses with their neighbours; "", whichever was measured to be faster.
_COMPILE: str = os.environ.get("BNORM_EXT_COMPILE", "").strip().lower()
if _COMPILE not in ("", "aten", "op"):
    raise ImportError(f"BNORM_EXT_COMPILE must be aten, op or unset, not {_COMPILE!r}")
_PLAIN_TORCH_FUNCTIONS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]  # a classmethod
    Parameter.__torch_function__,  # that of every class which switches it off
)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    act: Activation = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Normalises each channel of a batch: ``(input - mean) / sqrt(var + eps) * weight + bias``;
    then adds ``residual`` and applies ``act``, where they are given, in the same pass.

    Called like :func:`torch.nn.functional.batch_norm`, with the counter of batches besides. In
    training the statistics are those of the batch (with the biased variance), and the running
    ones, where given, are moved towards them by ``momentum`` (with the unbiased variance);
    otherwise the running statistics normalise. Differentiable to any order in ``input``,
    ``weight`` and ``bias``; works under ``torch.compile``, ``torch.export`` and ``torch.func``.

    Args:
        input: ``(N, C)`` or ``(N, C, ...)``, float64, float32, float16 or bfloat16, any strides.
            A memory format that is not dense costs one copy.
        running_mean, running_var: ``(C,)``, or None in training. Updated in place in training.
        weight, bias: ``(C,)`` or None, for 1 and 0.
            These four are of the dtype of ``input`` or, for 16-bit input, all float32.
        training: whether to normalise with the statistics of the batch.
        momentum: weight of the new batch in the running statistics. None gives each batch the
            same weight (cumulative average) and needs ``num_batches_tracked``.
        eps: added to the variance; positive in training, not negative in inference.
        num_batches_tracked: incremented in training. One int64 value is read on its device; any
            other tensor counts as that of :class:`torch.nn.BatchNorm2d` does, read on the host.
        residual: added to the normalised input, before ``act``: of the shape, dtype and device of
            ``input``, best in its memory format (another one costs a copy).
        act: None (or ``"identity"``), ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or
            ``"hardswish"``, or the ``torch.nn`` module of that name, as a class or an instance.
        negative_slope: of ``leaky_relu``; that of an ``nn.LeakyReLU`` instance goes before it.

    Returns:
        The shape, dtype and memory format of ``input``. With ``residual`` or ``act``, 16-bit
        results are rounded once, where separate operations round two or three times. For backward
        is kept: ``input``; after an addition also a mask of one bit an element (relu, relu6,
        leaky_relu) or ``residual`` itself (silu, hardswish). Gradients at kinks are torch's, for
        the unrounded sum.

    Raises:
        ValueError: one value per channel in training; running statistics half given; bad ``eps``;
            an unknown ``act``.
        RuntimeError: sizes, dtypes or devices do not fit.
        NotImplementedError: integer or complex input.
        TypeError: ``momentum=None`` without ``num_batches_tracked``.
            Types and texts are those of :func:`torch.nn.functional.batch_norm` for the same call.
            A call that raises has changed nothing.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    if act is not None:
        act, negative_slope = resolve(act, negative_slope)
    else:
        act = "identity"
    arguments = (
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        num_batches_tracked, residual, act, negative_slope,
    )  # fmt: skip
    if _is_dynamo_compiling():
        call = Arguments(*arguments)
        # Compiled transforms take neither kind of autograd Function.
        native = (
            transforms_active()
            or input.device.type not in KERNEL_DEVICES
            or type(input) not in (Tensor, Parameter)
            or torch.compiler.is_exporting()
            or (training and _counts_apart(num_batches_tracked, input))
        )
        return _native(call) if native else _compiled(call)
    try:
        if type(input) is not Tensor and isinstance(input, Proxy):
            named = dict(zip(Arguments._fields[8:], arguments[8:], strict=True))
            return input.tracer.create_proxy("call_function", batch_norm, arguments[:8], named)
        if type(eps) is not float or type(momentum) is not float:
            momentum, eps = _as_floats(training, momentum, eps, num_batches_tracked)
            arguments = (*arguments[:6], momentum, eps, *arguments[8:])
        tracing = torch.jit.is_tracing()
        if (
            tracing
            or torch.compiler.is_exporting()
            or _takes_native_path(input)
            # Which eps is too small differs between versions of torch: native knows.
            or eps <= 0
            # Other types are for native's parser to refuse.
            or (training is not True and training is not False)
        ):
            # A tracer would warn of each question about sizes.
            if training is True and not tracing and _counts_apart(num_batches_tracked, input):
                return _count_apart(Arguments(*arguments))
            return _native(Arguments(*arguments))
        if transforms_active() or FORWARD_STATE[FORWARD_LEVEL] >= 0:
            return _transforms.batch_norm(Arguments(*arguments))
        # As `_call_op`, without the cost of its call and of an `Arguments`.
        if training:
            return _training_op(
                input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                momentum, eps, act, negative_slope,
            )[0]  # fmt: skip
        return _inference_op(
            input, residual, weight, bias, running_mean, running_var, eps, act, negative_slope
        )[0]
    except Exception:
        call = Arguments(*arguments)
        if training is True and _counts_apart(num_batches_tracked, input):
            return _count_apart(call)
        _raise_as_native(call)
        raise


def _as_floats(training: bool, momentum: Any, eps: Any, counter: Any) -> tuple[Any, Any]:
    """Both as native reads them; raises where it does."""
    cumulative = momentum is None and counter is not None
    given = (0.0 if cumulative else momentum, eps)
    if not all(isinstance(value, (int, float)) for value in given):
        F.batch_norm(torch.empty(0, 1), None, None, None, None, training, *given)
    # An eps that is too small is named as it was given.
    return None if cumulative else float(momentum), eps if eps <= 0 else float(eps)


def _counts_apart(counter: Any, input: Any) -> bool:
    """Whether this counter is none that the operator takes."""
    return (isinstance(counter, Tensor) and isinstance(input, Tensor)) and not (
        counter.dtype is torch.int64 and counter.numel() == 1 and counter.device == input.device
    )


def _count_apart(call: Arguments) -> Tensor:
    """Counts as ``nn.BatchNorm2d`` does, but last: what fails has not counted."""
    counter: Any = call.num_batches_tracked
    counted = _counted(counter)
    momentum = 1.0 / float(counted) if call.momentum is None else call.momentum
    rest: Any = {name: getattr(call, name) for name in ("residual", "act", "negative_slope")}
    output = batch_norm(*call[:6], momentum, call.eps, **rest)
    counter.add_(1)
    return output


def _counted(counter: Tensor) -> Tensor:
    """What ``counter.add_(1)`` will make of it, in the counter's own dtype; raises what that will
    raise."""
    if (counter.is_inference() and not torch.is_inference_mode_enabled()) or (
        counter.requires_grad and counter.is_leaf and torch.is_grad_enabled()
    ):
        return counter.add_(1)
    given = counter.detach()
    if given.layout is not torch.strided:
        return given.clone().add_(1)
    alike = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return alike.copy_(given).add_(1)


def _compiled(call: Arguments) -> Tensor:
    """For a graph that is being compiled.

    The compiler gives convolutions other strides in forward than in backward. Alone, a batch norm
    is then faster in the compiler's own kernels; with an activation in the operator, which keeps
    nothing but its input. An addition is left to the compiler: the operator would keep a mask,
    whose bit layout follows the strides of forward.
    """
    # Torch's operators need a number for momentum, and the counter is on the device.
    needs_op = call.momentum is None and call.num_batches_tracked is not None
    is_alone = call.residual is None and call.act == "identity"
    if not needs_op and (_COMPILE == "aten" or (not _COMPILE and is_alone)):
        return _native(call)
    if call.residual is None:
        return _call_op(call)
    check_residual(call.input, call.residual)
    normalised = _call_op(Arguments(*call[:9]))
    return compose(normalised, call.residual, call.act, call.negative_slope)


def _call_op(a: Arguments) -> Tensor:
    if a.training:
        return _training_op(
            a.input, a.residual, a.weight, a.bias, a.running_mean, a.running_var,
            a.num_batches_tracked, a.momentum, a.eps, a.act, a.negative_slope,
        )[0]  # fmt: skip
    return _inference_op(
        a.input, a.residual, a.weight, a.bias, a.running_mean, a.running_var, a.eps, a.act,
        a.negative_slope,
    )[0]  # fmt: skip


def _takes_native_path(input: Tensor) -> bool:
    """Whether there are no kernels for this kind of tensor, or nothing for them to do."""
    if (
        input.device.type not in KERNEL_DEVICES
        or input.layout is not torch.strided
        or input.dim() < 2
        or input.numel() == 0
    ):
        return True
    if type(input) is Tensor:
        return input.is_nested
    torch_function: Any = type(input).__torch_function__
    if getattr(torch_function, "__func__", torch_function) not in _PLAIN_TORCH_FUNCTIONS:
        return True  # a subclass that treats torch's functions its own way
    if input.is_nested:
        return True
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(input, dtensor.DTensor)


def _native(call: Arguments) -> Tensor:
    """Torch's own operations with this function's arguments; the counter moves last, so that a call
    that fails has not counted."""
    residual, counter = call.residual, call.num_batches_tracked if call.training else None
    if residual is not None:
        check_residual(call.input, residual)
    momentum = call.momentum
    if momentum is None and counter is not None:
        momentum = 1.0 / float(counter.detach().clone().add_(1))
    # In a graph it moves first, as in native's: patterns of quantisers depend on the order.
    recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if recorded and counter is not None:
        counter.add_(1)
    output = F.batch_norm(*call[:6], momentum, call.eps)
    if counter is not None and not recorded:
        counter.add_(1)
    return compose(output, residual, call.act, call.negative_slope)


def _raise_as_native(call: Arguments) -> None:
    """Raises what native raises for a call that was refused here; returns where it takes it."""
    counter = call.num_batches_tracked
    if not (counter is None or isinstance(counter, Tensor)):
        raise TypeError(
            f"num_batches_tracked must be a Tensor or None, not {type(counter).__name__}"
        )
    copies = {
        name: t.detach().clone()
        for name in ("running_mean", "running_var", "num_batches_tracked")
        if isinstance(t := getattr(call, name), Tensor)
    }
    with torch.no_grad():
        try:
            _native(call._replace(**copies, residual=None, act="identity"))
            if isinstance(call.residual, Tensor):
                check_residual(call.input, call.residual)
        except Exception as error:
            raise error from None
