"""Batch normalisation as modules: drop-in subclasses of ``torch.nn.BatchNorm{1,2,3}d``.

Each class is a subclass of torch's own, so that constructor, attributes, ``state_dict``, repr,
hooks, copying and ``isinstance`` checks are torch's; only the forward pass is new, and all of
them share it: one operator call that normalises, updates the running statistics and counts the
batch.

The method is that of Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training
by Reducing Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from . import functional
from ._compat import BatchNormBase
from ._compat.modules import module_call, overrides_call, tensors_of

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

# Looked up on every call: as globals they cost one dictionary access instead of three.
_is_scripting = torch.jit.is_scripting
_ABSENT: Any = object()
_PACKAGE = f"{__package__}."


def is_ours(module: nn.Module) -> bool:
    """Whether it is a batch norm whose class is this package's own. A subclass that is defined
    elsewhere may do more than batch normalisation."""
    return isinstance(module, _BatchNormMixin) and type(module).__module__.startswith(_PACKAGE)


@overrides_call
class _BatchNormMixin(BatchNormBase):
    """The forward pass that all modules of this package share."""

    def forward(self, input: Tensor) -> Tensor:
        # TorchScript parses both branches but compiles the first only.
        if _is_scripting():
            return self._scripted_forward(input)
        else:
            return self._normalise(input, None, None, 0.01)

    def _normalise(
        self, input: Tensor, residual: Tensor | None, act: str | None, negative_slope: float
    ) -> Tensor:
        """``act(batch_norm(input) + residual)``, whatever activation the module has itself."""
        running_mean, running_var, weight, bias, training, momentum, counter = self._state(input)
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            # Not by plain access: some subclasses look who asks. A parameter lies elsewhere.
            self.__dict__["eps"] if "eps" in self.__dict__ else self.eps,  # noqa: SIM401
            num_batches_tracked=counter,
            residual=residual,
            act=act,
            negative_slope=negative_slope,
        )

    def _state(self, input: Tensor) -> tuple[Any, ...]:
        """What this call normalises with: running_mean, running_var, weight, bias, training,
        momentum, num_batches_tracked."""
        # A small layer is bound by host time, hence the unusual form: parameters and buffers are
        # taken from their dictionaries, since going through ``nn.Module.__getattr__`` costs about
        # as much as the rest of this function (and so would the eager default of ``dict.get``).
        # A name that is missing there has been replaced by pruning, parametrisation, weight norm
        # or the like, and is found by plain access.
        self._check_input_dim(input)
        parameters, buffers = tensors_of(self)
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        # By truth value, as native takes it; the function takes nothing but a bool.
        training = True if self.training else False  # noqa: SIM210  (bool() costs a call)
        momentum = self.momentum
        counter = None
        if training and not self.track_running_stats:
            # Tracking was turned off: buffers that are still there must stay as they are.
            running_mean = running_var = None
        else:
            running_mean = (
                buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
            )
            running_var = (
                buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
            )
            if not training:
                training = running_mean is None and running_var is None
            elif "num_batches_tracked" in buffers:
                counter = buffers["num_batches_tracked"]
            else:
                counter = self.num_batches_tracked
        if momentum is None and counter is None:
            momentum = 0.0  # native's: without a counter there is no average to extend
        return running_mean, running_var, weight, bias, training, momentum, counter

    def _scripted_forward(self, input: Tensor) -> Tensor:
        """What ``torch.jit.script`` compiles: native's operators, so that a scripted model runs
        (and loads from a file) without this package."""
        self._check_input_dim(input)
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        if self.training:
            batch_statistics = True
        else:
            batch_statistics = (self.running_mean is None) and (self.running_var is None)
        return F.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            batch_statistics,
            factor,
            self.eps,
        )

    def _called(self, input: Any = _ABSENT, /, *args: Any, **kwargs: Any) -> Any:
        """Makes the module one ``call_module`` node in every FX graph, as native's is.

        A tracer takes modules whose class lives in ``torch.nn`` for leaves and would trace into
        ours, which cannot work: the forward pass depends on the rank of its input. Here it is
        caught before the hooks run, so that they too run once per call of the traced graph.
        """
        if type(input) is Tensor:
            return module_call(self, input, *args, **kwargs)
        if input is _ABSENT:
            proxy = kwargs.get("input")
        else:
            proxy = input
            args = (input, *args)
        # A subclass from elsewhere is no leaf with native either; its own forward is traced.
        if isinstance(proxy, Proxy) and is_ours(self):
            tracer: Any = proxy.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return module_call(self, *args, **kwargs)


class BatchNorm1d(_BatchNormMixin, nn.BatchNorm1d):
    """Batch normalisation of 2-D or 3-D input: :class:`torch.nn.BatchNorm1d` on this package's
    kernels.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, with the statistics of the
    batch in training and the running statistics in evaluation (Ioffe & Szegedy 2015,
    arXiv:1502.03167). The output is normalised with the biased variance; ``running_var`` averages
    the unbiased one.

    Arguments, attributes and ``state_dict`` are those of :class:`torch.nn.BatchNorm1d`.

    Shape:
        - input: ``(N, C)`` or ``(N, C, L)``; output: the same shape and memory format.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes: float64, float32, float16 and bfloat16; parameters and running statistics in the
    input's dtype or, for 16-bit input, in float32.

    Raises:
        ValueError: the input has another rank, or one value per channel in training.
        RuntimeError: sizes, dtypes or devices do not match; with native's texts.
        A call that raises leaves running statistics and counter as they were.

    Example::

        >>> y = bnorm_ext.BatchNorm1d(100)(torch.randn(20, 100))
    """


class BatchNorm2d(_BatchNormMixin, nn.BatchNorm2d):
    """Batch normalisation of 4-D input: :class:`torch.nn.BatchNorm2d` on this package's kernels.

    As :class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for images: the statistics of
    a channel run over batch, height and width.

    Shape:
        - input: ``(N, C, H, W)``, contiguous, ``channels_last`` or of any other strides; output:
          the same shape and memory format.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes and errors: see :class:`BatchNorm1d`; here the rank must be 4.

    Example::

        >>> y = bnorm_ext.BatchNorm2d(100)(torch.randn(20, 100, 35, 45))
    """


class BatchNorm3d(_BatchNormMixin, nn.BatchNorm3d):
    """Batch normalisation of 5-D input: :class:`torch.nn.BatchNorm3d` on this package's kernels.

    As :class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for volumes: the statistics of
    a channel run over batch, depth, height and width.

    Shape:
        - input: ``(N, C, D, H, W)``, contiguous, ``channels_last_3d`` or of any other strides;
          output: the same shape and memory format.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes and errors: see :class:`BatchNorm1d`; here the rank must be 5.

    Example::

        >>> y = bnorm_ext.BatchNorm3d(100)(torch.randn(20, 100, 5, 35, 45))
    """


class LazyBatchNorm1d(_BatchNormMixin, nn.LazyBatchNorm1d):
    """:class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) that takes ``num_features``
    from ``input.size(1)`` of its first call and becomes a :class:`BatchNorm1d` there; arguments,
    shapes, dtypes and errors as there, behaviour as :class:`torch.nn.LazyBatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNormMixin, nn.LazyBatchNorm2d):
    """:class:`BatchNorm2d` (Ioffe & Szegedy 2015, arXiv:1502.03167) that takes ``num_features``
    from ``input.size(1)`` of its first call and becomes a :class:`BatchNorm2d` there; arguments,
    shapes, dtypes and errors as there, behaviour as :class:`torch.nn.LazyBatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNormMixin, nn.LazyBatchNorm3d):
    """:class:`BatchNorm3d` (Ioffe & Szegedy 2015, arXiv:1502.03167) that takes ``num_features``
    from ``input.size(1)`` of its first call and becomes a :class:`BatchNorm3d` there; arguments,
    shapes, dtypes and errors as there, behaviour as :class:`torch.nn.LazyBatchNorm3d`."""

    cls_to_become = BatchNorm3d
