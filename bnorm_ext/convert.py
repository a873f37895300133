"""Replacing native batch norm inside a model by this package's, and back.

Native module and replacement have the same instance layout, attribute for attribute, so a module
is converted by giving it the other class, as torch's own lazy modules and parametrisations do.
The object stays the object: its parameters and buffers, the optimizers that hold them, hooks and
their handles, train/eval mode, attributes set by the user, and every other reference to it (a
second name, a second parent, a Python list) stay valid with no copying at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from . import modules, modules_timm
from ._compat import AnyBatchNorm, tell_compiler
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


def convert_batchnorm(module: ModuleT, sync: bool = False, process_group: Any = None) -> ModuleT:
    """Replaces every native batch norm in ``module`` (and ``module`` itself) by this package's.

    Replaced is each module whose type is exactly ``torch.nn.BatchNorm1d/2d/3d`` or their lazy
    forms. It keeps the very same parameters and buffers, so an optimizer that was built before
    goes on, even in the middle of training; it also keeps train/eval mode, ``requires_grad``,
    hooks of every kind, dtype, device, its own extra attributes and its identity: a module used
    in several places stays shared. A ``state_dict`` of either side loads on the other with
    ``strict=True``.

    timm's ``BatchNormAct2d`` becomes a subclass of itself, ``BatchNormAct2d`` of
    ``bnorm_ext.modules_timm``, with its children ``drop`` and ``act``. It is one call where
    ``drop`` is ``nn.Identity`` and ``act`` an activation of :class:`bnorm_ext.BatchNormAct2d`.

    With ``sync=True`` every batch norm becomes a :class:`bnorm_ext.SyncBatchNorm`: torch's and this
    package's, ``torch.nn.SyncBatchNorm``, and those with an activation, which they keep. What was a
    ``SyncBatchNorm`` before keeps its process group where none is given.

    Already converted modules are left. Other subclasses of native batch norm
    (``nn.SyncBatchNorm``, parametrised ones) are left too, since their forward may do more, and are
    named in one ``UserWarning``.

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
    _check_module(module, "convert_batchnorm")
    if process_group is not None and not sync:
        raise ValueError("process_group is of use with sync=True only")
    left = change_classes(module, to_ours=True)
    if sync:
        left = synchronise(module, process_group)
    _warn_of(left, "convert_batchnorm")
    return module


def revert_batchnorm(module: ModuleT) -> ModuleT:
    """Undoes :func:`convert_batchnorm`: gives plain ``torch.nn`` batch norms back.

    Replaced is each module whose type is exactly one of this package's ``BatchNorm1d/2d/3d`` or
    their lazy forms, wherever it came from, and each ``BatchNormAct2d`` that was timm's. A
    ``SyncBatchNorm`` becomes what it was converted from, or else ``torch.nn.SyncBatchNorm``, where
    it has no activation. Everything that :func:`convert_batchnorm` keeps is kept here as well. A
    net made by :func:`fuse_batchnorm_act` is unfused too. Use it before tools that look for native's exact
    types (quantisation in eager mode, conv-bn folding in FX graphs). Other subclasses of this
    package's modules are left and named in one ``UserWarning``.

    Args:
        module: a model, or a single batch norm; changed in place.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    from .fuse.module import unfuse  # imports this module

    _check_module(module, "revert_batchnorm")
    unfuse(module)
    unsynchronise(module)
    _warn_of(change_classes(module, to_ours=False), "revert_batchnorm")
    return module


def change_classes(module: nn.Module, to_ours: bool) -> dict[str, list[str]]:
    """Changes classes between native's and ours in ``module`` and everything in it.

    Returns the names of the batch norms that were left, though not of a class that the change
    leads to, by class.
    """
    replacements: Mapping[type[nn.Module], type[nn.Module]] = _OURS if to_ours else _NATIVE
    left: dict[str, list[str]] = {}
    for name, child in module.named_modules():
        cls = type(child)
        if cls in replacements:
            child.__class__ = replacements[cls]
            tell_compiler(child)
        elif to_ours and (cls.__module__, cls.__qualname__) == modules_timm.NAME:
            child.__class__ = modules_timm.ours(cls)
            tell_compiler(child)
        elif not to_ours and hasattr(cls, "timms"):
            child.__class__ = cls.timms
            tell_compiler(child)
        elif isinstance(child, AnyBatchNorm) and to_ours is not isinstance(
            child, modules._OneCallForward
        ):
            left.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(name or "(root)")
    return left


def _check_module(module: nn.Module, caller: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{caller} expects a torch.nn.Module, got {type(module).__name__}")


def _warn_of(left: dict[str, list[str]], caller: str) -> None:
    if left:
        listed = "; ".join(f"{cls}: {', '.join(names)}" for cls, names in left.items())
        warnings.warn(
            f"{caller} left these batch norms as they are, since the forward of a subclass may do "
            f"more than batch normalisation: {listed}",
            stacklevel=3,
        )
