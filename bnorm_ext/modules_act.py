"""Batch normalisation, addition and activation in one pass, as modules."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._compat.modules import is_hooked
from .activations import Activation, name_of, resolve
from .modules import _BatchNormMixin, _is_scripting

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]


# Packages whose tools build other layers from the attributes of a batch norm.
_REBUILDING: tuple[str, ...] = ("torch.", "torchvision.", "timm.", "torchao.")
# Modules of torch that read attributes without building another layer from them.
_OBSERVING = ("torch._", "torch.jit", "torch.fx", "torch.export", "torch.onnx")


def activation_of(module: nn.Module) -> tuple[str | None, float]:
    """Name and slope of the activation that a module is; None as name if it is none of the known
    ones, or has hooks."""
    name = name_of(module)
    if name is None or is_hooked(module):
        return None, 0.01
    return name, module.negative_slope if name == "leaky_relu" else 0.01  # type: ignore[return-value]


class _BatchNormActMixin(_BatchNormMixin):
    """Constructor and forward pass that all batch norms with an activation share."""

    _rebuilding = _REBUILDING

    _not_scripted: tuple[str, ...] = ("eps",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Keeps TorchScript, which does not look at base classes, from compiling the properties.
        cls.__jit_unused_properties__ = list(cls._not_scripted)  # type: ignore[attr-defined]

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
        **kwargs: Any,
    ) -> None:
        name, slope = resolve(act, negative_slope)
        # kwargs: `bias`, which newer versions of torch take.
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        # Annotated here, because torch.jit.script cannot read annotations of the class that are
        # strings.
        self.act: str = name
        self.negative_slope: float = slope

    def activation(self) -> tuple[str | None, float]:
        """Name and slope of the activation; None as name if it is none of the known ones."""
        return self.act, self.negative_slope

    @property
    def eps(self) -> float:
        # A tool that builds another layer from the attributes of a batch norm reads eps. It does
        # not know of the activation and would drop it silently, so it gets an error instead.
        held: Any
        if torch.compiler.is_dynamo_compiling() and "_eps" in self.__dict__:
            # No such tool. Dynamo of torch 2.8 and 2.9 traces neither sys._getframe nor, in a
            # property, __dict__[its own name].
            held = self._eps
        else:
            name = sys._getframe(1).f_globals.get("__name__", "")
            if name.startswith(self._rebuilding) and not name.startswith(_OBSERVING):
                self._refuse_rebuilding(f"{name}.{sys._getframe(1).f_code.co_name}")
            held = self.__dict__["eps"] if "eps" in self.__dict__ else self.__getattr__("eps")
        value: float = held
        return value

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = self.__dict__["_eps"] = value

    def _refuse_rebuilding(self, caller: str) -> None:
        if self.activation()[0] != "identity":
            raise RuntimeError(
                f"{caller} makes another layer of {type(self).__name__}({self.extra_repr()}), "
                "which would lose its activation. Use a batch norm and an activation as two "
                "modules, or fuse them after that step (bnorm_ext.fuse_batchnorm_act)."
            )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # TorchScript parses both branches but compiles the first only.
        if _is_scripting():
            return self._scripted_act_forward(input, residual)
        else:
            return self._normalise(input, residual, self.act, self.negative_slope)

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
        text = super().extra_repr()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return f"{text}, act={self.act}{slope}"


class BatchNormAct1d(_BatchNormActMixin, nn.BatchNorm1d):
    """Batch normalisation of 2-D or 3-D input, then an addition and an activation, in one pass.

    Computes ``act(batch_norm(input) + residual)`` and replaces a :class:`BatchNorm1d` (Ioffe &
    Szegedy 2015, arXiv:1502.03167) and the operations after it. Parameters, buffers and
    ``state_dict`` are those of :class:`BatchNorm1d`: a checkpoint of the unfused net loads.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for
            :class:`torch.nn.BatchNorm1d`.
        act: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``, None (or
            ``"identity"``), or the ``torch.nn`` module of that name, as a class or an instance.
        negative_slope: of ``leaky_relu``. If ``act`` is an ``nn.LeakyReLU`` instance, its slope is
            used instead.

    Shape:
        - input: ``(N, C)`` or ``(N, C, L)``; residual, if given, and output: the same. The output
          has the input's memory format; a residual in another one costs a copy.
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``(C,)``.

    Dtypes: float64, float32, float16 and bfloat16. With 16-bit input, addition and activation are
    computed in float32 and the result is rounded once. The residual has the dtype of the input,
    parameters those that :class:`BatchNorm1d` takes.

    Raises:
        ValueError: an unknown ``act``; otherwise as :class:`BatchNorm1d`.
        RuntimeError: the residual has another shape, dtype or device than the input; otherwise as
            :class:`BatchNorm1d`. Also raised within ``convert_sync_batchnorm`` and other tools that
            would build another layer and drop the activation.

    Example::

        >>> y = bnorm_ext.BatchNormAct1d(100, act="silu")(torch.randn(20, 100))
    """


class BatchNormAct2d(_BatchNormActMixin, nn.BatchNorm2d):
    """Batch normalisation of 4-D input, then an addition and an activation, in one pass.

    As :class:`BatchNormAct1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for images.

    Shape:
        - input: ``(N, C, H, W)``, contiguous, ``channels_last`` or of any other strides;
          residual, where given, and output: the same shape.

    Arguments, dtypes and errors: see :class:`BatchNormAct1d`; here the rank must be 4.

    Example::

        >>> y = bnorm_ext.BatchNormAct2d(64)(torch.randn(8, 64, 56, 56), torch.randn(8, 64, 56, 56))
    """


class BatchNormAct3d(_BatchNormActMixin, nn.BatchNorm3d):
    """Batch normalisation of 5-D input, then an addition and an activation, in one pass.

    As :class:`BatchNormAct1d` (Ioffe & Szegedy 2015, arXiv:1502.03167) for volumes.

    Shape:
        - input: ``(N, C, D, H, W)``, contiguous, ``channels_last_3d`` or of any other strides;
          residual, where given, and output: the same shape.

    Arguments, dtypes and errors: see :class:`BatchNormAct1d`; here the rank must be 5.

    Example::

        >>> y = bnorm_ext.BatchNormAct3d(64)(torch.randn(2, 64, 4, 14, 14))
    """
