"""Batch normalisation, addition and activation in one pass, as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .activations import Activation, alike, compose, resolve
from .modules import _is_scripting, _OneCallForward

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]


def _get_qconfig(module: _ActForward) -> Any:
    """Not there, and says so loudly: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` puts a
    plain module in the place of every batch norm, and this is what it asks each for."""
    if "qconfig" in module.__dict__:
        return module.__dict__["qconfig"]
    if module.__dict__.get("act", "identity") == "identity":
        raise AttributeError("qconfig")
    raise RuntimeError(
        f"{type(module).__name__}({module.extra_repr()}) would lose its activation: "
        "convert_sync_batchnorm (and quantisation) would put a batch norm without one in its "
        "place. Convert before batch norms and activations are fused."
    )


def _set_qconfig(module: _ActForward, value: Any) -> None:
    module.__dict__["qconfig"] = value


_qconfig = property(_get_qconfig, _set_qconfig)


class _ActForward(_OneCallForward):
    """Constructor and forward pass that all modules of this file share."""

    # What becomes of a residual that is unlike the input in shape, dtype or device: an error, or
    # what the addition did that was fused (`fuse_batchnorm_act` sets which): "add" is y + residual,
    # "add_" y += residual, "radd_" residual += y.
    _unlike = "error"

    # For torch.jit.script: neither compiled nor looked at. It knows such properties in the very
    # class of a module only, hence `__init_subclass__`.
    __jit_unused_properties__ = ["qconfig"]  # noqa: RUF012
    __jit_ignored_attributes__ = ["qconfig"]  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.qconfig = _qconfig  # type: ignore[attr-defined]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: Activation = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name, slope = resolve(act, negative_slope)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        # Annotated here, not in the class: torch.jit.script cannot read the latter as strings.
        self.act: str = name
        self.negative_slope: float = slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # TorchScript parses both branches but compiles the first only.
        if _is_scripting():
            return self._scripted_act_forward(input, residual)
        elif residual is not None and self._unlike != "error" and not alike(input, residual):
            return self._composed(input, residual)
        else:
            running_mean, running_var, weight, bias, training, momentum, counter = self._state(
                input
            )
            return functional.batch_norm(
                input,
                running_mean,
                running_var,
                weight,
                bias,
                training,
                momentum,
                self.eps,
                num_batches_tracked=counter,
                residual=residual,
                act=self.act,
                negative_slope=self.negative_slope,
            )

    def _composed(self, input: Tensor, residual: Tensor) -> Tensor:
        """The separate operations, with all that an addition may do."""
        y = _OneCallForward.forward(self, input)
        if self._unlike == "add_":
            y += residual
        elif self._unlike == "radd_":
            residual += y
            y = residual
        else:
            y = torch.add(y, residual)
        return compose(y, None, self.act, self.negative_slope)

    def _scripted_act_forward(self, input: Tensor, residual: Tensor | None) -> Tensor:
        z = self._scripted_forward(input)
        if residual is not None:
            z = z + residual
        if self.act == "relu":
            return F.relu(z)
        if self.act == "relu6":
            return F.relu6(z)
        if self.act == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope)
        if self.act == "silu":
            return F.silu(z)
        if self.act == "hardswish":
            return F.hardswish(z)
        return z

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.act == "leaky_relu" else ""
        return f"{super().extra_repr()}, act={self.act}{slope}"


class BatchNormAct1d(_ActForward, nn.BatchNorm1d):
    """Batch normalisation of 2-D or 3-D input, then an addition and an activation, in one pass:
    ``act(batch_norm(input) + residual)``.

    In place of :class:`BatchNorm1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) with what follows it.
    Parameters, buffers and ``state_dict`` are those of the plain module: a checkpoint of the
    unfused net loads.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for
            :class:`torch.nn.BatchNorm1d`.
        act: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``, None (or
            ``"identity"``), or the ``torch.nn`` module of that name, as a class or an instance.
        negative_slope: of ``leaky_relu``; that of an ``nn.LeakyReLU`` instance goes before it.

    Shape:
        - input: ``(N, C)`` or ``(N, C, L)``; residual, where given, and output: the same. The
          output has the input's memory format; a residual in another one costs a copy.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes: float64, float32, float16 and bfloat16; 16-bit values are added and activated in
    float32 and rounded once. Parameters as for :class:`BatchNorm1d`; residual in the input's dtype.

    Raises:
        ValueError: an unknown ``act``; otherwise as :class:`BatchNorm1d`.
        RuntimeError: the residual has another shape, dtype or device than the input; otherwise as
            :class:`BatchNorm1d`. From ``convert_sync_batchnorm``, which would drop the activation.

    Example::

        >>> y = bnorm_ext.BatchNormAct1d(100, act="silu")(torch.randn(20, 100))
    """


class BatchNormAct2d(_ActForward, nn.BatchNorm2d):
    """Batch normalisation of 4-D input, then an addition and an activation, in one pass.

    As :class:`BatchNormAct1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for images.

    Shape:
        - input: ``(N, C, H, W)``, contiguous, ``channels_last`` or of any other strides;
          residual, where given, and output: the same shape.

    Arguments, dtypes and errors: see :class:`BatchNormAct1d`; here the rank must be 4.

    Example::

        >>> y = bnorm_ext.BatchNormAct2d(64)(torch.randn(8, 64, 56, 56), torch.randn(8, 64, 56, 56))
    """


class BatchNormAct3d(_ActForward, nn.BatchNorm3d):
    """Batch normalisation of 5-D input, then an addition and an activation, in one pass.

    As :class:`BatchNormAct1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for volumes.

    Shape:
        - input: ``(N, C, D, H, W)``, contiguous, ``channels_last_3d`` or of any other strides;
          residual, where given, and output: the same shape.

    Arguments, dtypes and errors: see :class:`BatchNormAct1d`; here the rank must be 5.

    Example::

        >>> y = bnorm_ext.BatchNormAct3d(64)(torch.randn(2, 64, 4, 14, 14))
    """
