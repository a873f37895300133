"""Private names of ``torch.nn.Module``: its dictionaries, its hooks, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as _module

_STATE = vars(nn.Module())

# --- parameters, buffers and children -------------------------------------------------------------

_HAS_TENSOR_DICTS = "_parameters" in _STATE and "_buffers" in _STATE
_NO_TENSORS: Mapping[str, Any] = {}


def tensors_of(module: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The dictionaries of parameters and buffers, for access without ``nn.Module.__getattr__``.

    Both are empty where torch keeps them elsewhere: callers read a missing name by ``getattr``.
    """
    return module._parameters, module._buffers


def _no_tensors_of(module: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return _NO_TENSORS, _NO_TENSORS


if not _HAS_TENSOR_DICTS:
    tensors_of = _no_tensors_of


def children_of(module: nn.Module) -> Mapping[str, Any]:
    """The direct children by name. A module that is registered under two names comes twice."""
    return module._modules


def _named_children_of(module: nn.Module) -> Mapping[str, Any]:
    # `named_children` would leave out the second name of a module.
    inside = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in inside if name and "." not in name}


if "_modules" not in _STATE:
    children_of = _named_children_of


def _internals() -> frozenset[str]:
    """The attributes that every module has, except the dictionaries of its tensors."""
    probe = nn.Module()
    probe.register_parameter("tensor", nn.Parameter(torch.empty(0)))
    probe.register_buffer("tensor_too", torch.empty(0))
    tensors = {
        name
        for name, held in vars(probe).items()
        if isinstance(held, dict) and ("tensor" in held or "tensor_too" in held)
    }
    return frozenset({"training", "_call_impl", *vars(probe)} - tensors)


INTERNALS = _internals()
#: The attributes that every module has.
OF_ALL = frozenset(_STATE)


# --- hooks ----------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HAS_HOOK_DICTS = all(name in _STATE for name in _HOOKS)
_UNKNOWN_HOOKS = f"hooks, for all that can be told with torch {torch.__version__}"

# Hooks that run on every call of every module. None where torch keeps them elsewhere.
_GLOBAL_HOOKS: tuple[Any, ...] | None
try:
    _GLOBAL_HOOKS = (
        _module._global_forward_hooks,
        _module._global_forward_pre_hooks,
        _module._global_backward_hooks,
        _module._global_backward_pre_hooks,
    )
except AttributeError:
    _GLOBAL_HOOKS = None


def has_global_module_hooks() -> bool:
    """Whether there are hooks on all modules; True too where that cannot be determined."""
    if _GLOBAL_HOOKS is None:
        return True
    a, b, c, d = _GLOBAL_HOOKS
    return bool(a or b or c or d)


_CALL = nn.Module.__call__


def is_call_replaced() -> bool:
    """Whether somebody has replaced how all modules are called, to see the calls."""
    return nn.Module.__call__ is not _CALL


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than the forward of its class: it has hooks, or its
    ``forward`` was replaced on the instance."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def _may_be_hooked(module: nn.Module) -> bool:
    return True


if not _HAS_HOOK_DICTS:
    is_hooked = _may_be_hooked


def hooks_of(module: nn.Module) -> str | None:
    """The kinds of hooks on a module that run when it is called, as text; None: it has none."""
    if not _HAS_HOOK_DICTS:
        return _UNKNOWN_HOOKS
    kinds = [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name, None)]
    return " and ".join(kinds) or None


def has_forward_hooks(module: Any) -> bool:
    """Whether a hook may replace the output of the module."""
    return not _HAS_HOOK_DICTS or bool(module._forward_hooks)


def has_hooks_at_forward(module: Any) -> bool:
    """Whether hooks run before or after the forward of the module."""
    return not _HAS_HOOK_DICTS or bool(module._forward_hooks or module._forward_pre_hooks)


# --- calls ----------------------------------------------------------------------------------------

#: What `nn.Module.__call__` calls. A class can override it, but not `__call__` itself: torch.fx and
#: torch.jit replace that while they trace.
module_call: Callable[..., Any] = getattr(nn.Module, "_call_impl", nn.Module.__call__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def overrides_call(cls: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: calling a module of this class calls its method ``_called``.

    Without the private name ``cls`` stays as it is.
    """
    if hasattr(nn.Module, "_call_impl"):
        cls._call_impl = cls._called  # type: ignore[attr-defined,method-assign]
    return cls


def has_own_call(cls: type[nn.Module]) -> bool:
    """Whether a class overrides how ``nn.Module`` is called."""
    own = getattr(cls, "_call_impl", None)
    return own is not getattr(nn.Module, "_call_impl", None) or (
        cls.__call__ is not nn.Module.__call__
    )


def catch_calls(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes calls of this one module call ``function``; see ``why_uncaught``."""
    vars(module)["_call_impl"] = function


def release_calls(module: nn.Module) -> None:
    """Undoes ``catch_calls``."""
    vars(module).pop("_call_impl", None)


def why_uncaught() -> str | None:
    """Why ``catch_calls`` has no effect with this torch; None where it has one."""
    probe, caught = nn.Module(), object()
    catch_calls(probe, lambda: caught)
    try:
        if probe() is caught:
            return None
    except NotImplementedError:  # a module without a forward
        pass
    return f"calls of the modules in it cannot be seen with torch {torch.__version__}"


# --- compilers ------------------------------------------------------------------------------------


def is_compiled(module: nn.Module) -> str | None:
    """By which compiler a module was compiled, as text, or that this cannot be determined; None:
    it was not compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if not hasattr(nn.Module, "_compiled_call_impl"):
        return f"whether it is compiled cannot be told with torch {torch.__version__}"
    # A module that torch.compile returns has a class that defines `_orig_mod`. Where torch has no
    # such name, the module counts as one whose forward was replaced on the instance, and is refused
    # as well.
    if vars(module).get("_compiled_call_impl") is not None or hasattr(module, "_orig_mod"):
        return "it is compiled by torch.compile"
    return None


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives ``module`` another class, and makes torch.compile notice.

    torch.compile guards a module by its type, but checks that again only after the dictionary of
    the module has changed. Hence the attribute that is set and deleted.
    """
    module.__class__ = cls
    module.__dict__["_class_changed"] = True
    del module.__dict__["_class_changed"]
