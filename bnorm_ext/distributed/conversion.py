"""Giving batch norms the class that shares statistics, and their own back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from .. import modules, modules_act, modules_timm
from .._compat import AnyBatchNorm
from .._compat.modules import change_class
from .module import SyncBatchNorm, _SyncMixin

# What a module is given back by `unsynchronise`, by what it is before.
_BEFORE: dict[type[nn.Module], type[nn.Module]] = {
    modules.BatchNorm1d: modules.BatchNorm1d,
    modules.BatchNorm2d: modules.BatchNorm2d,
    modules.BatchNorm3d: modules.BatchNorm3d,
    modules_act.BatchNormAct1d: modules_act.BatchNormAct1d,
    modules_act.BatchNormAct2d: modules_act.BatchNormAct2d,
    modules_act.BatchNormAct3d: modules_act.BatchNormAct3d,
    nn.SyncBatchNorm: nn.SyncBatchNorm,
}
_RECORD = "class_before_sync"


def synchronise(module: nn.Module, process_group: Any) -> dict[type[nn.Module], list[str]]:
    """Changes the class of each batch norm in ``module`` that is this package's, or torch's
    ``SyncBatchNorm``. Returns the names of the others, by class."""
    left: dict[type[nn.Module], list[str]] = {}
    for name, child in module.named_modules():
        cls = type(child)
        if isinstance(child, _SyncMixin):
            if process_group is not None:
                child.process_group = process_group
        elif cls in _BEFORE or hasattr(cls, "timms"):
            state = vars(child)
            state[_RECORD] = cls
            state["layer_name"] = name or None
            if not hasattr(cls, "timms"):
                state.setdefault("act", "identity")
                state.setdefault("negative_slope", 0.01)
            own = state.pop("process_group", None)
            change_class(child, _with_timm(cls) if hasattr(cls, "timms") else SyncBatchNorm)
            child.process_group = own if process_group is None else process_group
        elif isinstance(child, AnyBatchNorm):
            left.setdefault(cls, []).append(name or "(root)")
    return left


def unsynchronise(module: nn.Module) -> None:
    """Undoes :func:`synchronise`; a module that was made as a ``SyncBatchNorm`` without activation
    becomes torch's."""
    for child in module.modules():
        if not isinstance(child, _SyncMixin):
            continue
        state = vars(child)
        before = state.pop(_RECORD, None)
        if before is None and state.get("act") == "identity":
            before = nn.SyncBatchNorm
        if before is None:
            continue
        group = child.process_group
        for name in ("_process_group", "layer_name"):
            state.pop(name, None)
        change_class(child, before)
        if before is nn.SyncBatchNorm:
            child.process_group = group
        if not isinstance(child, modules_act._BatchNormActMixin):
            state.pop("act", None)
            state.pop("negative_slope", None)


def _sync_subclass(cls: type[nn.Module]) -> Any:
    """The subclass of our version of timm's batch norm that shares statistics."""
    return type(f"Sync{cls.__name__}", (_SyncMixin, cls), {"__module__": __name__})


# The cast, because mypy does not take a class of modules for hashable.
_with_timm = cast(Callable[[type[nn.Module]], Any], functools.cache(_sync_subclass))


def __getattr__(name: str) -> Any:
    # For unpickling.
    if name == f"Sync{modules_timm.NAME[1]}":
        return _with_timm(modules_timm.BatchNormAct2d)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
