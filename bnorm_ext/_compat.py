"""The private names of torch that this package uses, each with what happens where it is missing.

torch may rename or remove any of these in any release; then what depends on it becomes slower or is
refused with a reason, and nothing else breaks. No other module may use such a name, and
``tests/test_compat.py`` takes each of ``NAMES`` away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.lazy import LazyModuleMixin

#: Name -> what happens where it is missing.
NAMES: dict[str, str] = {
    "torch._C._are_functorch_transforms_active": "slower: every call takes the way of torch.func",
    "torch._C._functorch.get_interpreter_stack": "slower: torch.func takes plain operations",
    "torch._C._functorch.TransformType": "slower: torch.func takes plain operations",
    "torch.autograd.forward_ad._current_level": "slower: every call takes the way of torch.func",
    "torch._prims_common.suggest_memory_format": "the same, done here",
    "torch._subclasses.fake_tensor.FakeTensorMode": "fusing learns no shapes: fused calls check",
    "torch.nn.modules.batchnorm._BatchNorm": "the same, found as the base of public classes",
    "torch.nn.BatchNorm2d._check_input_dim": "the same, done here",
    "torch.nn.modules.module._global_forward_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_forward_pre_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_backward_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_backward_pre_hooks": "slower: fused graphs are not run",
    "torch.nn.Module._forward_hooks": "fusing is refused",
    "torch.nn.Module._forward_pre_hooks": "fusing is refused",
    "torch.nn.Module._backward_hooks": "fusing is refused",
    "torch.nn.Module._backward_pre_hooks": "fusing is refused",
    "torch.nn.Module._parameters": "slower: tensors are found by plain access",
    "torch.nn.Module._buffers": "slower: tensors are found by plain access",
    "torch.nn.Module._modules": "slower: children are found by named_modules",
    "torch.nn.Module._call_impl": "fusing is refused; a graph calls the function, not the module",
    "torch.nn.Module._compiled_call_impl": "fusing is refused",
}

_HELD = vars(nn.Module())


# --- transforms -----------------------------------------------------------------------------------


def _always() -> bool:
    return True


# Whether torch.func is at work. Right under torch.func is right without it too.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _always
)

# Where forward AD keeps how deep it is, and under which name; -1: it is not at work. A dictionary,
# since a call of a function is a measurable part of a small batch norm.
FORWARD_LEVEL = "_current_level"
FORWARD_STATE: Mapping[str, Any] = (
    vars(forward_ad) if hasattr(forward_ad, FORWARD_LEVEL) else {FORWARD_LEVEL: 0}
)


def may_be_forward_over_forward() -> bool:
    """Whether several forward derivatives of torch.func are nested, for all that can be told."""
    try:
        stack = torch._C._functorch.get_interpreter_stack() or ()
        jvp = torch._C._functorch.TransformType.Jvp
    except AttributeError:
        return True
    return sum(interpreter.key() == jvp for interpreter in stack) > 1


# --- tensors --------------------------------------------------------------------------------------


def channels_last_or_contiguous(x: Tensor) -> torch.memory_format:
    """As ``at::Tensor::suggest_memory_format`` in C++."""
    orders = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}
    if x.layout is not torch.strided or x.dim() not in orders or x.stride(1) == 0:
        return torch.contiguous_format
    least: Any = 0
    for dim in orders[x.dim()]:
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# torch's own also knows sizes that are known to the compiler alone.
try:
    from torch._prims_common import suggest_memory_format
except ImportError:
    suggest_memory_format = channels_last_or_contiguous

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:
    FakeTensorMode = None  # type: ignore[assignment,misc]


@contextmanager
def fake_tensors() -> Iterator[Callable[[Tensor], Tensor] | None]:
    """Nothing is computed meanwhile. Gives what makes a tensor fake; None where there is no such
    mode, and everything is computed as ever."""
    if FakeTensorMode is None:
        yield None
        return
    # An operation that fails on fake tensors is no error: torch would log it as one.
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield lambda tensor: mode.from_tensor(tensor, static_shapes=True)
    finally:
        logger.disabled = before


# --- batch norms ----------------------------------------------------------------------------------

try:
    from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
except ImportError:
    AnyBatchNorm = next(  # type: ignore[misc]
        cls for cls in nn.BatchNorm2d.__mro__ if issubclass(nn.SyncBatchNorm, cls)
    )

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def _check_rank(self: nn.Module, input: Tensor) -> None:
    for cls, ranks in _RANKS.items():
        if isinstance(self, cls) and input.dim() not in ranks:
            expected = " or ".join(f"{rank}D" for rank in ranks)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")


class BatchNormBase(AnyBatchNorm):
    """What this package's modules derive from, before native's class."""

    # Called by this name in modules.py: a subclass may override it as it may override native's, and
    # TorchScript compiles the call. Native's classes come later in the order of bases.
    if not hasattr(nn.BatchNorm2d, "_check_input_dim"):
        _check_input_dim = _check_rank


def is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin)


# --- what modules hold ----------------------------------------------------------------------------

_KEEPS_TENSORS = "_parameters" in _HELD and "_buffers" in _HELD
_KEEPS_CHILDREN = "_modules" in _HELD
_NO_TENSORS: Mapping[str, Any] = {}


def tensors_of(module: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Parameters and buffers by name, without a search; those that are missing here are found by
    plain access."""
    return module._parameters, module._buffers


def _no_tensors_of(module: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return _NO_TENSORS, _NO_TENSORS


if not _KEEPS_TENSORS:
    tensors_of = _no_tensors_of


def children_of(module: Any) -> Mapping[str, Any]:
    """The modules that ``module`` holds by name, each under all of its names."""
    return module._modules


def _named_children_of(module: Any) -> Mapping[str, Any]:
    # `named_children` leaves the second name of a module out.
    inside = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in inside if name and "." not in name}


if not _KEEPS_CHILDREN:
    children_of = _named_children_of


def _internals() -> frozenset[str]:
    """What every module has, but for the dictionaries of its tensors, whatever they are called."""
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


# --- hooks ----------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHOWS_HOOKS = all(name in _HELD for name in _HOOKS)
_UNSEEN_HOOKS = f"hooks, for all that can be told with torch {torch.__version__}"

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


def _may_be_hooked(module: nn.Module) -> bool:
    return True


if not _SHOWS_HOOKS:
    is_hooked = _may_be_hooked


def hooks_of(module: nn.Module) -> str | None:
    """The kinds of hooks on a module that see its calls, in words."""
    if not _SHOWS_HOOKS:
        return _UNSEEN_HOOKS
    kinds = [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name, None)]
    return " and ".join(kinds) or None


def has_forward_hooks(module: Any) -> bool:
    """Whether a hook may replace the output of the module."""
    return not _SHOWS_HOOKS or bool(module._forward_hooks)


def has_hooks_at_forward(module: Any) -> bool:
    """Whether hooks run before or after the forward of the module."""
    return not _SHOWS_HOOKS or bool(module._forward_hooks or module._forward_pre_hooks)


# --- calls ----------------------------------------------------------------------------------------

# What `nn.Module.__call__` calls. It can be overridden where `__call__` itself cannot: torch.fx and
# torch.jit replace that.
module_call: Callable[..., Any] = getattr(nn.Module, "_call_impl", nn.Module.__call__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def overrides_call(cls: type[ModuleT]) -> type[ModuleT]:
    """Makes a call of a module of this class go to its method ``_called``. Where it cannot, ``cls``
    stays as it is."""
    if hasattr(nn.Module, "_call_impl"):
        cls._call_impl = cls._called  # type: ignore[attr-defined]
    return cls


def has_own_call(cls: type[nn.Module]) -> bool:
    """Whether a call of such a module is not that of ``nn.Module``."""
    own = getattr(cls, "_call_impl", None)
    return own is not getattr(nn.Module, "_call_impl", None) or (
        cls.__call__ is not nn.Module.__call__
    )


def catch_calls(module: nn.Module, function: Callable[..., Any]) -> None:
    """Makes calls of this one module go to ``function``, see ``why_uncaught``."""
    vars(module)["_call_impl"] = function


def release_calls(module: nn.Module) -> None:
    vars(module).pop("_call_impl", None)


def why_uncaught() -> str | None:
    """Why ``catch_calls`` has no effect here; None where it has one."""
    probe, caught = nn.Module(), object()
    catch_calls(probe, lambda: caught)
    try:
        if probe() is caught:
            return None
    except NotImplementedError:  # a module without a forward
        pass
    return f"calls of the modules in it cannot be seen with torch {torch.__version__}"


def is_compiled(module: nn.Module) -> str | None:
    """That a module was compiled, in words, or that this cannot be told."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if not hasattr(nn.Module, "_compiled_call_impl"):
        return f"whether it is compiled cannot be told with torch {torch.__version__}"
    # A module that torch.compile returns has the class of an attribute `_orig_mod`; where that is
    # missing, its forward counts as replaced on the instance, which is refused too.
    if vars(module).get("_compiled_call_impl") is not None or hasattr(module, "_orig_mod"):
        return "it is compiled by torch.compile"
    return None


def tell_compiler(module: nn.Module) -> None:
    """torch.compile guards a module by its type, but looks again only once the module's
    dictionary has changed."""
    module.__dict__["_class_changed"] = True
    del module.__dict__["_class_changed"]
