"""Which modules a graph calls, instead of containing what their forward does."""

from __future__ import annotations

from torch import fx, nn

from .._compat.modules import has_own_call, hooks_of, is_compiled
from ..modules import is_ours


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer or container of torch, or a batch norm of this package."""
    return is_ours(module) or fx.Tracer().is_leaf_module(module, "")


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module: it is a layer, or its call does more than its forward."""
    return (
        is_layer(module)
        or hooks_of(module) is not None
        or is_compiled(module) is not None
        or "forward" in vars(module)
        or has_own_call(type(module))
    )
