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
from typing import TypeVar

from torch import nn

from . import modules, modules_act
from .activations import resolve

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

# timm's batch norm with activation is told by its name: timm need not be there.
_TIMM = ("timm.layers.norm_act", "BatchNormAct2d")
_TIMM_CHILDREN = {"drop", "act"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def convert_batchnorm(module: ModuleT) -> ModuleT:
    """Replaces every native batch norm in ``module`` (and ``module`` itself) by this package's.

    Replaced is each module whose type is exactly ``torch.nn.BatchNorm1d/2d/3d`` or their lazy
    forms. It keeps the very same parameters and buffers, so an optimizer that was built before
    goes on, even in the middle of training; it also keeps train/eval mode, ``requires_grad``,
    hooks of every kind, dtype, device, its own extra attributes and its identity: a module used
    in several places stays shared. A ``state_dict`` of either side loads on the other with
    ``strict=True``.

    timm's ``BatchNormAct2d`` becomes :class:`bnorm_ext.BatchNormAct2d` if its ``drop`` is
    ``nn.Identity`` and its ``act`` one of the activations known there. These two children, which
    have no parameters, are put aside: :func:`revert_batchnorm` restores the module with them.

    Already converted modules are left. Other subclasses of native batch norm
    (``nn.SyncBatchNorm``, timm's with other activations, parametrised ones) are left too, since
    their forward may do more, and are named in one ``UserWarning``.

    The method is that of Ioffe & Szegedy 2015, arXiv:1502.03167; shapes and dtypes are those of
    :class:`bnorm_ext.BatchNorm1d`, ``2d`` and ``3d``.

    Args:
        module: a model, or a single batch norm; changed in place. To keep the original, pass
            ``copy.deepcopy(model)``.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.

    Example::

        >>> model = bnorm_ext.convert_batchnorm(torchvision.models.resnet50())
    """
    _check_module(module, "convert_batchnorm")
    _warn_of(change_classes(module, to_ours=True), "convert_batchnorm")
    return module


def revert_batchnorm(module: ModuleT) -> ModuleT:
    """Undoes :func:`convert_batchnorm`: gives plain ``torch.nn`` batch norms back.

    Replaced is each module whose type is exactly one of this package's ``BatchNorm1d/2d/3d`` or
    their lazy forms, wherever it came from, and each ``BatchNormAct2d`` that was timm's;
    everything that :func:`convert_batchnorm` keeps is kept here as well. Use it before tools that
    look for native's exact types (ONNX export, quantisation, conv-bn folding in FX graphs). Other
    subclasses of this package's modules are left and named in one ``UserWarning``.

    Args:
        module: a model, or a single batch norm; changed in place.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    _check_module(module, "revert_batchnorm")
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
            _tell_compiler(child)
        elif to_ours and (cls.__module__, cls.__qualname__) == _TIMM and _convert_timm(child):
            continue
        elif not to_ours and "_unfused" in vars(child):
            _revert_timm(child)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and to_ours is not isinstance(
            child, modules._OneCallForward
        ):
            left.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(name or "(root)")
    return left


def _convert_timm(module: nn.Module) -> bool:
    """Makes timm's BatchNormAct2d one of ours, if it does nothing that ours does not."""
    children = dict(module._modules)
    if children.keys() != _TIMM_CHILDREN or type(children["drop"]) is not nn.Identity:
        return False
    for child in children.values():
        if "forward" in vars(child) or any(getattr(child, hooks) for hooks in _HOOKS):
            return False
    try:
        act, slope = resolve(children["act"], 0.01)
    except ValueError:
        return False
    vars(module)["_unfused"] = (type(module), children)
    module._modules.clear()
    module.__class__ = modules_act.BatchNormAct2d
    module.act, module.negative_slope = act, slope  # type: ignore[assignment]
    _tell_compiler(module)
    return True


def _revert_timm(module: nn.Module) -> None:
    state = vars(module)
    cls, children = state.pop("_unfused")
    del state["act"], state["negative_slope"]
    module.__class__ = cls
    module._modules.update(children)
    for child in children.values():
        child.train(module.training)
    _tell_compiler(module)


def _tell_compiler(module: nn.Module) -> None:
    """torch.compile guards a module by its type, but looks again only once the module's
    dictionary has changed."""
    module.__dict__["_class_changed"] = True
    del module.__dict__["_class_changed"]


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
