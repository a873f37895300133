"""Replacing native batch norm inside a model by this package's, and back.

Native module and replacement have the same attributes, so a module is converted by assigning its
``__class__``, as torch does for lazy modules and parametrisations. Nothing is copied and the object
stays the same. So everything that refers to it or to its tensors stays valid: optimizers, hooks and
their handles, attributes set by the user, a second parent of the module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from . import modules, modules_timm
from ._compat import AnyBatchNorm
from ._compat.modules import change_class
from .distributed.conversion import synchronise, unsynchronise

__all__ = ["convert_batchnorm", "revert_batchnorm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
}
_NATIVE = {ours: native for native, ours in _OURS.items()}
# Somebody may replace it, for all batch norms of the process.
_NATIVES_FORWARD = nn.BatchNorm2d.forward


def convert_batchnorm(module: ModuleT, sync: bool = False, process_group: Any = None) -> ModuleT:
    """Replaces every native batch norm in ``module`` (and ``module`` itself) by this package's.

    This replaces each module whose type is exactly ``torch.nn.BatchNorm1d/2d/3d`` or one of their
    lazy forms. The module keeps its parameters and buffers, so an optimizer that was built before
    stays valid, even in the middle of training. It also keeps its mode, ``requires_grad``, hooks,
    dtype, device, extra attributes and identity: a module that is used in several places stays
    shared. A ``state_dict`` of either kind loads into the other with ``strict=True``.

    timm's ``BatchNormAct2d`` becomes ``bnorm_ext.modules_timm.BatchNormAct2d``, a subclass of
    timm's class with the same children ``drop`` and ``act``. Its forward is one call if ``drop`` is
    ``nn.Identity`` and ``act`` is an activation that :class:`bnorm_ext.BatchNormAct2d` takes.

    With ``sync=True`` every batch norm becomes a :class:`bnorm_ext.SyncBatchNorm`: torch's and this
    package's, ``torch.nn.SyncBatchNorm``, and those with an activation, which they keep. One that
    was a ``SyncBatchNorm`` before keeps its process group if none is given.

    Modules that are converted already stay as they are. Other subclasses of native batch norm
    (parametrised ones, ``nn.SyncBatchNorm`` without ``sync=True``), and classes of torch whose
    ``forward`` somebody has replaced, stay as they are too, because their forward may do more; one
    ``UserWarning`` names them.

    The method is that of Ioffe & Szegedy 2015, arXiv:1502.03167; shapes and dtypes are those of
    :class:`bnorm_ext.BatchNorm1d`, ``2d`` and ``3d``.

    Args:
        module: a model, or a single batch norm; changed in place. To keep the original, pass
            ``copy.deepcopy(model)``.
        sync: whether the statistics of a training batch are shared between processes.
        process_group: with ``sync``, the ranks that share them; None for all.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: a ``process_group`` without ``sync=True``.

    Example::

        >>> model = bnorm_ext.convert_batchnorm(torchvision.models.resnet50())
    """
    check_module(module, "convert_batchnorm")
    if process_group is not None and not sync:
        raise ValueError("process_group is of use with sync=True only")
    left = change_classes(module, to_ours=True)
    if sync:
        left = synchronise(module, process_group)
    _warn_of(left, "convert_batchnorm")
    return module


def revert_batchnorm(module: ModuleT) -> ModuleT:
    """Undoes :func:`convert_batchnorm`: gives plain ``torch.nn`` batch norms back.

    This replaces each module whose type is exactly one of this package's ``BatchNorm1d/2d/3d`` or
    one of their lazy forms, whether it was converted or built as such, and each ``BatchNormAct2d``
    that was timm's. A ``SyncBatchNorm`` becomes what it was converted from; one that was built as
    such, and has no activation, becomes ``torch.nn.SyncBatchNorm``. It keeps everything that
    :func:`convert_batchnorm` keeps. A net made by :func:`bnorm_ext.fuse_batchnorm_act` is unfused
    too. Use it before tools that look for native's exact types (quantisation in eager mode, folding
    of convolution and batch norm in FX graphs). Other subclasses of this package's modules stay as
    they are; one ``UserWarning`` names them.

    Args:
        module: a model, or a single batch norm; changed in place.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    from .fuse.fused_module import unfuse  # here, because bnorm_ext.fuse imports this module

    check_module(module, "revert_batchnorm")
    unfuse(module)
    unsynchronise(module)
    _warn_of(change_classes(module, to_ours=False), "revert_batchnorm")
    return module


def change_classes(module: nn.Module, to_ours: bool) -> dict[type[nn.Module], list[str]]:
    """Changes classes from native's to this package's (``to_ours``) or back, in ``module`` and in
    everything inside.

    Returns:
        The batch norms for which there is no replacement: their names by class.
    """
    replacements: Mapping[type[nn.Module], type[nn.Module]] = _OURS if to_ours else _NATIVE
    left: dict[type[nn.Module], list[str]] = {}
    for name, child in module.named_modules():
        cls = type(child)
        if cls in replacements and not (to_ours and cls.forward is not _NATIVES_FORWARD):
            change_class(child, replacements[cls])
        elif to_ours and (cls.__module__, cls.__qualname__) == modules_timm.NAME:
            change_class(child, modules_timm.ours(cls))
            child.eps = child.eps  # through the setter, as a constructor does
        elif not to_ours and hasattr(cls, "timms"):
            change_class(child, cls.timms)
            vars(child).pop("_eps", None)
        elif isinstance(child, AnyBatchNorm) and to_ours is not isinstance(
            child, modules._BatchNormMixin
        ):
            left.setdefault(cls, []).append(name or "(root)")
    return left


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def check_module(module: nn.Module, caller: str) -> None:
    """Raises TypeError where ``module`` is no module; ``caller`` is named in the text."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{caller} expects a torch.nn.Module, got {type(module).__name__}")


def _warn_of(left: dict[type[nn.Module], list[str]], caller: str) -> None:
    if left:
        listed = "; ".join(f"{class_name(c)}: {', '.join(names)}" for c, names in left.items())
        warnings.warn(
            f"{caller} left these batch norms as they are, since their forward may do more than "
            f"batch normalisation: {listed}",
            stacklevel=3,
        )
