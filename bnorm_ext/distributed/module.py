"""``SyncBatchNorm``, the module."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import _refusals
from .._arguments import Arguments
from .._compat import BatchNormBase
from .._cuda import has_code, has_code_while_tracing
from .._load import warn_without_cuda_kernels
from .._ops import ASKED_DEVICES, KERNEL_DEVICES
from .._scalars import as_floats, counted, counts_apart, one_for
from ..activations import Activation, check_residual, resolve
from ..functional import raise_as_native
from ..modules_act import _BatchNormActMixin
from . import composite
from .agreement import DTYPES
from .function import Normalise
from .statistics import Buffers, Gathered, gathered, merged, update

__all__ = ["SyncBatchNorm"]


class _HeldGroup:
    """Keeps a process group, which cannot be copied: a copy of the module has the same one, a
    pickled module asks for another."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _HeldGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _lost_group, ()


_LOST: Any = object()
_HALVES = (torch.float16, torch.bfloat16)


def _lost_group() -> _HeldGroup:
    return _HeldGroup(_LOST)


class _SyncMixin(_BatchNormActMixin):
    """The forward pass of every batch norm that shares its statistics."""

    _not_scripted: tuple[str, ...] = ("eps", "process_group")
    layer_name = None  # where the module was in the model that was converted, for messages

    @property
    def process_group(self) -> Any:
        """The ranks that share statistics; None for all."""
        held = self.__dict__.get("_process_group")
        return None if held is None else held.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.__dict__["_process_group"] = None if group is None else _HeldGroup(group)

    def _normalise(
        self, input: Tensor, residual: Tensor | None, act: str | None, negative_slope: float
    ) -> Tensor:
        group = self._group(input)
        if group is None:
            return super()._normalise(input, residual, act, negative_slope)
        world = dist.get_world_size(group)
        mean, var, weight, bias, _, momentum, counter = self._state(input)
        _check(input, residual, mean, var, weight, bias, act)
        apart = counts_apart(counter, input)
        one = one_for(counter) if apart else None
        if apart and momentum is None:
            momentum = 1.0 / float(counted(counter))
        momentum, eps = as_floats(True, momentum, self.__dict__["eps"], counter)
        buffers = Buffers(mean, var, None if apart else counter, momentum)
        named = act or "identity"
        layer = self.layer_name or type(self).__name__
        tensors = (input, residual, weight, bias)
        epilogue = (named, negative_slope)
        if not _has_kernels(input):
            y = composite.training_step(*tensors, buffers, eps, *epilogue, layer, group)
        else:
            with torch.no_grad():
                found = gathered(input.detach(), layer, world, group)
            y = None if found is None else _step(tensors, found, buffers, eps, epilogue, group)
        if y is None:
            return super()._normalise(input, residual, act, negative_slope)
        if apart:
            counter.add_(one)
        return y

    def _group(self, input: Tensor) -> Any:
        """The process group of this call; None where nothing is shared."""
        # The group is read first: a compiled graph is guarded by it, and compiled again when
        # torch.distributed is initialised after the first call.
        everyone = dist.group.WORLD if dist.is_available() else None
        if everyone is None or not self.training or input.dtype not in DTYPES:
            return None
        group = self.process_group
        if group is _LOST:
            raise RuntimeError(
                "SyncBatchNorm: the process group was not pickled with the module. Set "
                "process_group, to None for all ranks."
            )
        if group is None:
            group = everyone
        if input.device.type == "meta" or dist.get_world_size(group) <= 1:
            return None  # -1: this rank is not in the group; natively it shares nothing then
        return group

    def _scripted_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.training:
            raise RuntimeError("SyncBatchNorm is scripted for evaluation only")
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.running_mean is None,
            0.0,
            self.eps,
        )


def _step(
    tensors: tuple[Tensor | None, ...],
    found: Gathered,
    buffers: Buffers,
    eps: float,
    epilogue: tuple[str, float],
    group: Any,
) -> Any:
    """The output, and last, when nothing else can fail, the update of ``buffers``."""
    input = tensors[0]
    assert input is not None
    with torch.no_grad():
        mean, rstd = merged(found, eps, input.dtype)
        total = found.counts.sum()
    y = Normalise.apply(*tensors, mean, rstd, total, eps, *epilogue, group)
    with torch.no_grad():
        update(found, buffers, eps, input.dtype)
    return y


def _has_kernels(input: Tensor) -> bool:
    kind, tracing = input.device.type, torch.compiler.is_compiling()
    if kind not in KERNEL_DEVICES:
        if kind == "cuda" and not tracing:
            warn_without_cuda_kernels()
        return False
    if kind not in ASKED_DEVICES:
        return True
    return bool(has_code_while_tracing(input.device.index)) if tracing else has_code(input)


def _check(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
) -> None:
    """Raises what is wrong on this rank, before anything is sent or changed."""
    resolve(act, 0.01)
    if residual is not None:
        check_residual(input, residual)
    _refusals.gradients(running_mean, running_var)
    known = (input.dtype, torch.float32 if input.dtype in _HALVES else input.dtype)
    of_channels = (running_mean, running_var, weight, bias)
    if any(
        t is not None
        and (t.dtype not in known or t.numel() != input.size(1) or t.device != input.device)
        for t in of_channels
    ):
        raise_as_native(Arguments(input, running_mean, running_var, weight, bias, True, 0.1, 1e-5))


class SyncBatchNorm(_SyncMixin, BatchNormBase):
    """Batch normalisation with statistics over the batches of all processes of a group, then an
    addition and an activation where they are given: ``act(batch_norm(input) + residual)``.

    In training, each rank of the process group contributes its batch, and every rank normalises
    with mean and variance over all of them (Ioffe & Szegedy 2015, arXiv:1502.03167; merged as by
    Chan, Golub & LeVeque 1983), so that a batch that is split between ranks gives the results of
    one process with the whole batch. A forward pass sends one message (two for wide layers on many
    ranks), a backward pass one. The host waits for the device only at a layer's first call, and on
    a rank with at most one value per channel. Batches may differ in size and may be empty. In
    evaluation, in a group of one rank, and where ``torch.distributed`` is not initialised, it is
    :class:`bnorm_ext.BatchNormAct2d` without its check of the rank.

    The gradients of ``weight`` and ``bias`` are those of this rank's batch, for
    ``DistributedDataParallel`` or FSDP to average. CPU tensors need a group with a CPU backend
    (Gloo), CUDA tensors one with a CUDA backend (NCCL).

    ``isinstance(m, torch.nn.modules.batchnorm._BatchNorm)`` holds, ``isinstance(m,
    torch.nn.SyncBatchNorm)`` does not: DistributedDataParallel refuses CPU modules of that class.

    Args:
        num_features: C of the input.
        eps, momentum, affine, track_running_stats, device, dtype: as for
            :class:`torch.nn.SyncBatchNorm`.
        process_group: the ranks that share statistics; None for all.
        act, negative_slope: as for :class:`bnorm_ext.BatchNormAct2d`, though None by default.

    Shape:
        - input: ``(N, C)`` or ``(N, C, ...)``, where N and what follows C may differ between
          ranks; residual, where given, and output: the same.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes: float64, float32, float16 and bfloat16, the same on all ranks; parameters as for
    :class:`bnorm_ext.BatchNorm1d`. Sums over ranks are in float64.

    Raises:
        ValueError: one value per channel over all ranks in training (on every rank); the input has
            fewer than two dimensions, or no channels.
        RuntimeError: at the first call, on every rank, where the ranks' inputs differ in channels
            or dtype, or are those of different layers; what the backend raises for a rank that
            died or came too late; otherwise as :class:`bnorm_ext.BatchNormAct2d`.

    Example::

        >>> model = bnorm_ext.convert_batchnorm(model, sync=True)
        >>> model = torch.nn.parallel.DistributedDataParallel(model)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        act: Activation = None,
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            act,
            negative_slope,
            device,
            dtype,
            **kwargs,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")
