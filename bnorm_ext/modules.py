"""Batch normalisation as modules: drop-in subclasses of ``torch.nn.BatchNorm{1,2,3}d``.

Each class is a subclass of torch's own. Constructor, attributes, ``state_dict``, repr, hooks,
copying and ``isinstance`` checks are therefore torch's. Only the forward pass is new, and all
classes share it: one operator call normalises, updates the running statistics and counts the batch.

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

# Looked up on every call: a global costs one dictionary access instead of three.
_is_scripting = torch.jit.is_scripting
_is_compiling = torch.compiler.is_dynamo_compiling
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
            # From the dictionary, because in some subclasses eps is a property that refuses certain
            # callers; Dynamo takes the property. An eps that is a parameter is not in there.
            self.__dict__["eps"]
            if "eps" in self.__dict__ and not (_is_compiling() and "_eps" in self.__dict__)
            else self.eps,
            num_batches_tracked=counter,
            residual=residual,
            act=act,
            negative_slope=negative_slope,
        )

    def _state(self, input: Tensor) -> tuple[Any, ...]:
        """The arguments of this call: running_mean, running_var, weight, bias, training, momentum,
        num_batches_tracked."""
        # The host time of a small layer matters, hence the unusual form. Tensors are read from the
        # dictionaries of parameters and buffers, because ``nn.Module.__getattr__`` would cost about
        # as much as the rest of this function. So would ``dict.get``, whose default is evaluated on
        # every call. A name that is missing there was replaced by pruning, parametrisation, weight
        # norm or the like, and is read as an attribute.
        self._check_input_dim(input)
        parameters, buffers = tensors_of(self)
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        # Native uses the truth value; the function takes a bool only.
        training = True if self.training else False  # noqa: SIM210  (bool() costs a call)
        momentum = self.momentum
        counter = None
        if training and not self.track_running_stats:
            # Tracking was switched off after construction: the buffers must not be updated.
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
            momentum = 0.0  # as native: there is no cumulative average without a counter
        return running_mean, running_var, weight, bias, training, momentum, counter

    def _scripted_forward(self, input: Tensor) -> Tensor:
        """What ``torch.jit.script`` compiles. It uses native's operators only, so that a scripted
        model can be loaded and run without this package."""
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
        """Makes the module one ``call_module`` node in every FX graph, like native's.

        A tracer treats modules as leaves if their class is in ``torch.nn``. It would trace into the
        forward of this package's modules, which fails because that depends on the rank of its
        input. The call is intercepted before the hooks run, so that a hook runs once for each call
        of the graph and not during tracing.
        """
        if type(input) is Tensor:
            return module_call(self, input, *args, **kwargs)
        if input is _ABSENT:
            proxy = kwargs.get("input")
        else:
            proxy = input
            args = (input, *args)
        # A subclass from elsewhere is no leaf with native either: its forward is traced.
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

    Dtypes: float64, float32, float16 and bfloat16. Parameters and running statistics have the dtype
    of the input or, for 16-bit input, float32.

    Raises:
        ValueError: the input has another rank, or one value per channel in training.
        RuntimeError: sizes, dtypes or devices do not match.

    Texts of errors are native's. A call that raises changes neither running statistics nor counter.

    Example::

        >>> y = bnorm_ext.BatchNorm1d(100)(torch.randn(20, 100))
    """


class BatchNorm2d(_BatchNormMixin, nn.BatchNorm2d):
    """Batch normalisation of 4-D input: :class:`torch.nn.BatchNorm2d` on this package's kernels.

    As :class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for images: the statistics of
    a channel are taken over batch, height and width.

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
    a channel are taken over batch, depth, height and width.

    Shape:
        - input: ``(N, C, D, H, W)``, contiguous, ``channels_last_3d`` or of any other strides;
          output: the same shape and memory format.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes and errors: see :class:`BatchNorm1d`; here the rank must be 5.

    Example::

        >>> y = bnorm_ext.BatchNorm3d(100)(torch.randn(20, 100, 5, 35, 45))
    """


class LazyBatchNorm1d(_BatchNormMixin, nn.LazyBatchNorm1d):
    """:class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) without ``num_features``.

    The first call takes it from ``input.size(1)`` and turns the module into a
    :class:`BatchNorm1d`. Shapes, dtypes and errors are those of that class, arguments and
    behaviour those of :class:`torch.nn.LazyBatchNorm1d`.
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNormMixin, nn.LazyBatchNorm2d):
    """:class:`BatchNorm2d` (Ioffe & Szegedy 2015, arXiv:1502.03167) without ``num_features``.

    The first call takes it from ``input.size(1)`` and turns the module into a
    :class:`BatchNorm2d`. Shapes, dtypes and errors are those of that class, arguments and
    behaviour those of :class:`torch.nn.LazyBatchNorm2d`.
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNormMixin, nn.LazyBatchNorm3d):
    """:class:`BatchNorm3d` (Ioffe & Szegedy 2015, arXiv:1502.03167) without ``num_features``.

    The first call takes it from ``input.size(1)`` and turns the module into a
    :class:`BatchNorm3d`. Shapes, dtypes and errors are those of that class, arguments and
    behaviour those of :class:`torch.nn.LazyBatchNorm3d`.
    """

    cls_to_become = BatchNorm3d
