"""The private names of torch that this package uses, each with what happens where it is missing.

torch may rename or remove any of these in any release; then what depends on it becomes slower or is
refused with a reason, and nothing else breaks.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _module

# Hooks that run on every call of every module. A version that keeps them elsewhere is taken to have
# some: batch norms then run unfused.
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
    if _GLOBAL_HOOKS is None:
        return True
    a, b, c, d = _GLOBAL_HOOKS
    return bool(a or b or c or d)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than the forward of its class."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def tell_compiler(module: nn.Module) -> None:
    """torch.compile guards a module by its type, but looks again only once the module's
    dictionary has changed."""
    module.__dict__["_class_changed"] = True
    del module.__dict__["_class_changed"]
