"""Questions about modules that tracing and fusing both ask."""

from __future__ import annotations

from torch import fx, nn

from .._compat.modules import has_own_call, hooks_of, is_compiled
from ..modules import _PACKAGE, _BatchNormMixin

__all__ = ["has_forward", "hooks_of", "is_compiled", "is_layer", "is_leaf"]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer or container of torch, or a batch norm of this package: its forward is
    not traced."""
    ours = isinstance(module, _BatchNormMixin) and type(module).__module__.startswith(_PACKAGE)
    return ours or fx.Tracer().is_leaf_module(module, "")


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module, rather than doing what its forward does."""
    cls = type(module)
    return (
        is_layer(module)
        or hooks_of(module) is not None
        or is_compiled(module) is not None
        or "forward" in vars(module)
        or has_own_call(cls)
    )
