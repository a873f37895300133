"""Questions about modules that tracing and fusing both ask."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..modules import _PACKAGE, _OneCallForward

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> str | None:
    """The kinds of hooks on a module that see its calls, in words."""
    kinds = [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name, None)]
    return " and ".join(kinds) or None


def is_torchs(module: nn.Module) -> bool:
    """Whether it is a layer or container of torch itself, whose forward is not traced."""
    return fx.Tracer().is_leaf_module(module, "")


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_compiled(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if vars(module).get("_compiled_call_impl") is not None or hasattr(module, "_orig_mod"):
        return "it is compiled by torch.compile"
    return None


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module, rather than doing what its forward does."""
    cls = type(module)
    return (
        is_torchs(module)
        or (isinstance(module, _OneCallForward) and cls.__module__.startswith(_PACKAGE))
        or hooks_of(module) is not None
        or is_compiled(module) is not None
        or "forward" in vars(module)
        or cls._call_impl is not nn.Module._call_impl
        or cls.__call__ is not nn.Module.__call__
    )
