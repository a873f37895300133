"""A module that runs a graph where that is right, and its own forward otherwise.

Fusing replaces the class of a module by a subclass with another ``forward``; attributes, hooks and
children stay. Each call checks the guard of the module (``guards.py``) and runs the graph only if
nothing has changed.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .._compat import has_function_modes, is_exporting
from .._compat.modules import (
    change_class,
    children_of,
    has_global_module_hooks,
    is_call_replaced,
)
from .copying import copy_sharing_the_rest
from .guards import Guard
from .program import Program

_FUSION = "_bnorm_ext_fusion"


@dataclass
class Fusion:
    """What a fused module holds."""

    program: Program
    guard: Guard


class FusedModule(nn.Module):
    """Base of the classes of fused modules, before the module's own class."""

    _unfused: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call the ``__init_subclass__`` of the model's class, which may register its
        subclasses: this class is made internally."""

    def unfuse(self) -> nn.Module:
        """Undoes :func:`bnorm_ext.fuse_batchnorm_act` in place, as
        :func:`bnorm_ext.revert_batchnorm` does: the modules run their own forwards, and the batch
        norms are those of ``torch.nn``.

        Returns:
            The module itself.
        """
        from ..convert import revert_batchnorm

        return revert_batchnorm(self)

    def __getattr__(self, name: str) -> Any:
        # No properties, because a model may have attributes of these names. Not called `graph`,
        # because torch's ONNX exporter takes a module with that attribute for a TorchScript module.
        asked = name in ("fused_graph", "fused_code") and _FUSION in self.__dict__
        if asked and name not in children_of(self):
            return getattr(self.__dict__[_FUSION].program, name.removeprefix("fused_"))
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # The class is made at run time, so pickle cannot import it: it is made again from the
        # module's own class.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._unfused, "forward" in vars(type(self)))
            return (_new_instance, arguments, *reduced[2:])
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles instead of this module: a copy with its own forwards."""
        copied, *_ = copy_sharing_the_rest(self)
        return unfuse(copied)


def _new_instance(cls: type[nn.Module], runs_graph: bool) -> nn.Module:
    made = fused_class(cls, runs_graph)
    return made.__new__(made)


def _fused_class(cls: type[nn.Module], runs_graph: bool) -> type[nn.Module]:
    """A subclass of :class:`FusedModule` and ``cls``. With ``runs_graph`` its forward runs the
    graph of the module, else it is the forward of ``cls``."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body: dict[str, Any] = {**names, "_unfused": cls}
    if hasattr(cls, "unfuse"):  # the model's own
        body["unfuse"] = cls.unfuse
    if runs_graph:

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fusion = self.__dict__.get(_FUSION)
            if fusion is None or has_global_module_hooks() or _is_traced(args, kwargs):
                return cls.forward(self, *args, **kwargs)
            if not _are_tensors(args) or not _are_tensors(kwargs.values()):
                return cls.forward(self, *args, **kwargs)
            if not _fit(fusion.program.inputs, args, kwargs):
                return cls.forward(self, *args, **kwargs)  # which raises the error
            called: list[Any] = [None] * len(fusion.program.modules)
            if not fusion.guard.check(self, called):
                return cls.forward(self, *args, **kwargs)
            return fusion.program.run(self, *called, *args, **kwargs)

        # For tools that do not follow `__wrapped__`, such as `inspect.getfullargspec`.
        vars(forward)["__signature__"] = inspect.signature(cls.forward)
        body["forward"] = forward
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (FusedModule, cls), body)
    return made


# The cast, because mypy does not take a class of modules for hashable.
fused_class = cast(
    Callable[[type[nn.Module], bool], type[nn.Module]], functools.cache(_fused_class)
)


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tool is tracing or exporting, or looks at all calls of modules or functions. It has
    to see the modules, not the graph."""
    if torch.compiler.is_dynamo_compiling():
        return is_exporting()
    return (
        torch.jit.is_tracing()
        or is_exporting()
        or has_function_modes()
        or is_call_replaced()
        or any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
    )


def _fit(inputs: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments that the forward takes, all of which it needs."""
    if len(args) + len(kwargs) != len(inputs):
        return False
    return not kwargs or all(name in inputs[len(args) :] for name in kwargs)


def _are_tensors(values: Iterable[Any]) -> bool:
    """Whether all are tensors, alone or in lists, tuples and dictionaries, as they were in tracing.
    A forward may have asked whether one of them is None."""
    for value in values:
        if isinstance(value, Tensor):
            continue
        kind = type(value)
        if kind is list or kind is tuple:
            if not _are_tensors(value):
                return False
        elif not (kind is dict and _are_tensors(value.values())):
            return False
    return True


def run_graph(module: nn.Module, fusion: Fusion) -> None:
    """Makes ``module`` run a graph, in place."""
    vars(module)[_FUSION] = fusion
    change_class(module, fused_class(type(module), True))


def be_undoable(module: nn.Module) -> None:
    """Gives ``module`` the method ``unfuse``, if it has none."""
    # The class of a GraphModule or of a parametrised module is made for that one object.
    one_object = isinstance(module, fx.GraphModule) or parametrize.is_parametrized(module)
    if not one_object and not isinstance(module, FusedModule | torch.jit.ScriptModule):
        change_class(module, fused_class(type(module), False))


def unfuse(model: nn.Module) -> nn.Module:
    """Gives all modules in ``model`` their own class and forward back; returns ``model``."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            vars(module).pop(_FUSION, None)
            # A tool may have made a subclass of the fused class since, as FSDP does. That stays.
            if "_unfused" in vars(type(module)):
                change_class(module, module._unfused)
    return model
