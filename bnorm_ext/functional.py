"""Batch normalisation as a function.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv:1502.03167.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter

from . import _transforms
from ._arguments import Arguments
from ._compat import (
    FORWARD_LEVEL,
    FORWARD_STATE,
    is_exporting,
    is_functionalizing,
    transforms_active,
)  # fmt: skip
from ._cuda import has_code, has_code_while_tracing
from ._load import warn_without_cuda_kernels
from ._memory import has_unwritable_buffers, lacks_memory
from ._ops import ASKED_DEVICES, KERNEL_DEVICES
from ._scalars import as_floats, counted, counts_apart, one_for
from .activations import Activation, check_residual, compose, resolve

# Looked up once, because host time dominates for small tensors.
_ops = torch.ops.bnorm_ext
_Operator = Callable[..., tuple[Tensor, ...]]
_training_op = cast(_Operator, _ops.batch_norm_training.default if KERNEL_DEVICES else None)
_inference_op = cast(_Operator, _ops.batch_norm_inference.default if KERNEL_DEVICES else None)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
# What a compiled graph contains. "op": this package's operators. "aten": torch's own, which the
# compiler fuses with neighbouring operations. "": whichever was measured to be faster.
_COMPILE: str = os.environ.get("BNORM_EXT_COMPILE", "").strip().lower()
if _COMPILE not in ("", "aten", "op"):
    raise ImportError(f"BNORM_EXT_COMPILE must be aten, op or unset, not {_COMPILE!r}")
_PLAIN_TORCH_FUNCTIONS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]  # a classmethod
    Parameter.__torch_function__,  # shared by all classes that disable __torch_function__
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
    r"""Batch normalisation, and in the same pass an addition and an activation.

    Computes ``(input - mean) / sqrt(var + eps) * weight + bias`` for each channel, then adds
    ``residual`` and applies ``act`` if they are given. The first eight arguments are those of
    :func:`torch.nn.functional.batch_norm`.

    In training, mean and (biased) variance are those of the batch. The running statistics, if
    given, are updated: ``(1 - momentum) * running + momentum * batch``, with the unbiased variance.
    Otherwise mean and variance are the running statistics. Differentiable to any order in
    ``input``, ``weight``, ``bias`` and ``residual``; works under ``torch.compile``,
    ``torch.export`` and ``torch.func``.

    Args:
        input: ``(N, C)`` or ``(N, C, ...)``; float64, float32, float16 or bfloat16; any strides.
            Input that is not dense in a memory format is copied once.
        running_mean, running_var: ``(C,)``, or both None in training. In training they are updated
            in place. Dtype as for ``weight``.
        weight, bias: ``(C,)``, or None for 1 and 0. Of the dtype of ``input``; for 16-bit input all
            four vectors may be float32 instead.
        training: whether to normalise by the statistics of the batch.
        momentum: weight of the batch in the running statistics. None gives all batches the same
            weight (a cumulative average) and needs ``num_batches_tracked``.
        eps: added to the variance. Positive in training, not negative in inference.
        num_batches_tracked: counter that is incremented in training. One int64 value on the device
            of ``input`` is read there; any other tensor is read on the host, as by
            :class:`torch.nn.BatchNorm2d`.
        residual: added before ``act``. Of the shape, dtype and device of ``input``; another memory
            format than that of ``input`` costs a copy.
        act: None (or ``"identity"``), ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or
            ``"hardswish"``, or the ``torch.nn`` module of that name, as a class or an instance.
        negative_slope: of ``leaky_relu``. If ``act`` is an ``nn.LeakyReLU`` instance, its slope is
            used instead.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``. 16-bit results are rounded
        once; separate operations would round after each. At the kinks of an activation the
        gradient is the one that torch defines, taken at the unrounded sum.

    Raises:
        ValueError: one value per channel in training; only one of the running statistics is given;
            invalid ``eps``; unknown ``act``.
        RuntimeError: sizes, dtypes or devices do not match.
        NotImplementedError: integer or complex input.
        TypeError: ``momentum=None`` without ``num_batches_tracked``.

    Types and texts of errors are those of :func:`torch.nn.functional.batch_norm` for the same call.
    A call that raises changes none of its arguments.

    Memory: backward keeps ``input``, after an addition also a mask of one bit per element (relu,
    relu6, leaky_relu) or ``residual`` itself (silu, hardswish).

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
        # Transforms in compiled code support neither C++ nor Python autograd Functions.
        native = (
            transforms_active()
            or input.device.type not in KERNEL_DEVICES
            or (
                input.device.type in ASKED_DEVICES
                and not has_code_while_tracing(input.device.index)
            )
            or type(input) not in (Tensor, Parameter)
            or is_exporting()
            or (training and counts_apart(num_batches_tracked, input))
        )
        return _native(call) if native else _compiled(call)
    try:
        if type(input) is not Tensor and isinstance(input, Proxy):
            named = dict(zip(Arguments._fields[8:], arguments[8:], strict=True))
            return input.tracer.create_proxy("call_function", batch_norm, arguments[:8], named)
        if type(eps) is not float or type(momentum) is not float:
            momentum, eps = as_floats(training, momentum, eps, num_batches_tracked)
            arguments = (*arguments[:6], momentum, eps, *arguments[8:])
        tracing = torch.jit.is_tracing()
        if (
            tracing
            or is_exporting()
            or _takes_native_path(input)
            # Which eps is too small depends on the version of torch: left to native.
            or eps <= 0
            # Any other type is refused by native's argument parser.
            or (training is not True and training is not False)
        ):
            # Not while tracing: the tracer would warn about the test of the size.
            if training is True and not tracing and counts_apart(num_batches_tracked, input):
                return _count_apart(Arguments(*arguments))
            return _native(Arguments(*arguments))
        if transforms_active() or FORWARD_STATE[FORWARD_LEVEL] >= 0:
            if is_functionalizing():
                return _native(Arguments(*arguments))
            return _transforms.batch_norm(Arguments(*arguments))
        # What `_call_op` does, without the host time of a function call and a tuple.
        if training:
            return _training_op(
                input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                momentum, eps, act, negative_slope,
            )[0]  # fmt: skip
        return _inference_op(
            input, residual, weight, bias, running_mean, running_var, eps, act, negative_slope
        )[0]
    except Exception as error:
        call = Arguments(*arguments)
        if lacks_memory(call):
            raise  # native would read what is not there
        if training is True and counts_apart(num_batches_tracked, input):
            return _count_apart(call)
        raise_as_native(call)
        if (
            isinstance(error, NotImplementedError)
            or has_unwritable_buffers(call)
            or any(map(_has_own_dispatch, call))
        ):
            return _native(call)
        raise


def _count_apart(call: Arguments) -> Tensor:
    """Batch norm with a counter that the operator does not take: it is incremented here as in
    ``nn.BatchNorm2d``, but last, so that a call that fails does not count."""
    counter: Any = call.num_batches_tracked
    count, one = counted(counter), one_for(counter)
    momentum = 1.0 / float(count) if call.momentum is None else call.momentum
    rest: Any = {name: getattr(call, name) for name in ("residual", "act", "negative_slope")}
    output = batch_norm(*call[:6], momentum, call.eps, **rest)
    counter.add_(one)
    return output


def _compiled(call: Arguments) -> Tensor:
    """Batch norm in a graph that is being compiled.

    The compiler gives convolutions other strides in backward than in forward. A batch norm without
    an activation is then faster as one of the compiler's own kernels, one with an activation as the
    operator, which keeps only its input for backward. An addition is left to the compiler, because
    the operator would keep a mask whose bit layout depends on the strides of forward.
    """
    # A cumulative average needs the operator: torch's takes momentum as a number, which would have
    # to be computed from the counter on the host.
    needs_op = call.momentum is None and call.num_batches_tracked is not None
    if not needs_op and (_COMPILE == "aten" or (not _COMPILE and call.act == "identity")):
        return _native(call)
    if call.residual is None:
        return _call_op(call)
    check_residual(call.input, call.residual)
    normalised = _call_op(call, plain=True)
    return compose(normalised, call.residual, call.act, call.negative_slope)


def _call_op(a: Arguments, plain: bool = False) -> Tensor:
    """``plain``: without residual and activation."""
    residual, act = (None, "identity") if plain else (a.residual, a.act)
    if a.training:
        return _training_op(
            a.input, residual, a.weight, a.bias, a.running_mean, a.running_var,
            a.num_batches_tracked, a.momentum, a.eps, act, a.negative_slope,
        )[0]  # fmt: skip
    return _inference_op(
        a.input, residual, a.weight, a.bias, a.running_mean, a.running_var, a.eps, act,
        a.negative_slope,
    )[0]  # fmt: skip


def _takes_native_path(input: Tensor) -> bool:
    """Whether there are no kernels for this kind of tensor, or it has no elements."""
    kind = input.device.type
    if kind not in KERNEL_DEVICES:
        if kind == "cuda":
            warn_without_cuda_kernels()
        return True
    if kind in ASKED_DEVICES and not has_code(input):
        return True
    if input.layout is not torch.strided or input.dim() < 2 or input.numel() == 0:
        return True
    if type(input) is Tensor:
        return input.is_nested
    return has_own_functions(input) or input.is_nested or _has_own_dispatch(input)


def has_own_functions(t: Tensor) -> bool:
    """Whether it is of a subclass that overrides torch's functions (``__torch_function__``)."""
    if type(t) in (Tensor, Parameter):  # all that Dynamo has to trace
        return False
    own: Any = type(t).__torch_function__
    return getattr(own, "__func__", own) not in _PLAIN_TORCH_FUNCTIONS


def _has_own_dispatch(t: Any) -> bool:
    """Whether it is of a subclass that handles operators itself (``__torch_dispatch__``), and so
    may know only torch's own. The fake tensors of compilers know all operators."""
    cls = type(t)
    return (
        isinstance(t, Tensor)
        and getattr(cls, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__
        and not cls.__module__.startswith("torch._subclasses.")
    )


def _native(call: Arguments) -> Tensor:
    """Torch's own operations for these arguments. The counter is incremented last, so that a call
    that fails does not count."""
    residual, counter = call.residual, call.num_batches_tracked if call.training else None
    if residual is not None:
        check_residual(call.input, residual)
    momentum = call.momentum
    if momentum is None and counter is not None:
        momentum = 1.0 / float(counter.detach().clone().add_(1))
    # In a recorded graph it is incremented first, as by native's modules: quantisation tools match
    # patterns in that order.
    recorded = is_exporting() or torch.jit.is_tracing()
    if recorded and counter is not None:
        counter.add_(1)
    # By name: torch.compile of torch 2.8 cannot slice a named tuple.
    statistics = (call.running_mean, call.running_var)
    affine = (call.weight, call.bias)
    output = F.batch_norm(call.input, *statistics, *affine, call.training, momentum, call.eps)
    output = compose(output, residual, call.act, call.negative_slope)
    if counter is not None and not recorded:
        counter.add_(1)
    return output


def raise_as_native(call: Arguments) -> None:
    """Makes the call with native on copies of the buffers, to raise the error that native raises.
    Returns if native accepts the call."""
    counter = call.num_batches_tracked
    if not (counter is None or isinstance(counter, Tensor)):
        raise TypeError(
            f"num_batches_tracked must be a Tensor or None, not {type(counter).__name__}"
        )
    copies: dict[str, Any] = {
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
