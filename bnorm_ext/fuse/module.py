"""A module that runs a graph where it may, and its own forward where the graph would be wrong.

The module keeps class, attributes, hooks and children. Only its class is replaced, by a subclass
with another ``forward``. The graph does the work of the forwards inside the module too, so it is
right as long as nothing about these has changed: no hook that a call would run, no other child, no
other value of an attribute that they read. That is looked at on each call.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .._compat.modules import (
    INTERNALS,
    change_class,
    children_of,
    has_global_module_hooks,
    is_hooked,
)
from .copying import copy_with_same_tensors
from .program import Program

_FUSION = "_bnorm_ext_fusion"
_ABSENT = "(absent)"


@dataclass
class Inside:
    """What a module was like when its forward went into a graph. Copied together with the module,
    so that objects among the attributes are those of the copy."""

    cls: type[nn.Module]
    children: tuple[str, ...]
    attributes: list[tuple[str, Any, tuple[Any, ...] | None]]  # name, value, what is in it
    called: list[tuple[str, int]]  # children that the graph calls: name, number for the graph
    inside: list[tuple[str, Inside]]  # children whose forward is in the graph

    def find(self, module: nn.Module, called: list[Any]) -> bool:
        """Puts the modules that the graph calls into ``called``; False if something has changed."""
        state = module.__dict__
        children = children_of(module)
        if tuple(children) != self.children:
            return False
        for name, value, contents in self.attributes:
            now = state.get(name, _ABSENT)
            if now is not value and not (type(now) in _SIMPLE and now == value):
                return False
            if contents is not None and _contents(now) != contents:
                return False
        for name, number in self.called:
            called[number] = children[name]
        for name, inside in self.inside:
            child = children[name]
            if type(child) is not inside.cls or is_hooked(child) or not inside.find(child, called):
                return False
        return True


_SIMPLE = (bool, int, float, str, tuple)


def _contents(value: Any) -> tuple[Any, ...] | None:
    if type(value) is list:
        return tuple(map(id, value))
    if type(value) is dict:
        return tuple((key, id(held)) for key, held in value.items())
    return None


def inside_of(
    module: nn.Module,
    watched: set[str],
    called: dict[str, int],
    names: Iterable[str],
    path: str = "",
) -> Inside:
    """``watched``: paths of the modules that must stay as they are; ``called``: of those that the
    graph calls, and their numbers; ``names``: what forwards read of modules, if they have
    attributes of these names."""
    state = vars(module)
    attributes = [
        (name, state.get(name, _ABSENT), _contents(state.get(name)))
        for name in sorted(names)
        if name not in INTERNALS
        and not name.startswith("__")
        and (name in state or _is_default(module, name))
    ]
    held = children_of(module)
    children = [(name, f"{path}.{name}".strip("."), m) for name, m in held.items()]
    return Inside(
        type(module),
        tuple(held),
        attributes,
        [(name, called[place]) for name, place, _ in children if place in called],
        [
            (name, inside_of(child, watched, called, names, place))
            for name, place, child in children
            if child is not None and place in watched
        ],
    )


def _is_default(module: nn.Module, name: str) -> bool:
    """Whether the class holds a value that an attribute of the instance may replace."""
    value = getattr(type(module), name, None)
    return isinstance(value, bool | int | float | str | tuple | list)


@dataclass
class Fusion:
    program: Program
    inside: Inside


class FusedModule(nn.Module):
    """What the class of a fused module has besides the module's own."""

    _unfused: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps a model's own ``__init_subclass__``, a register of its classes for instance, from
        learning of this one."""

    def unfuse(self) -> nn.Module:
        """Undoes :func:`bnorm_ext.fuse_batchnorm_act`: plain ``torch.nn`` batch norms, and the
        forwards that the modules had; as :func:`bnorm_ext.revert_batchnorm`, in place.

        Returns:
            The module itself.
        """
        from ..convert import revert_batchnorm

        return revert_batchnorm(self)

    def __getattr__(self, name: str) -> Any:
        # Not properties: a model may have attributes of these names. Not `graph`: torch's ONNX
        # exporter takes what has one for a TorchScript module.
        if name in ("fused_graph", "fused_code") and _FUSION in self.__dict__:
            return getattr(self.__dict__[_FUSION].program, name.removeprefix("fused_"))
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # The class is made at run time: what can be found again is the one it was made from.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._unfused, "forward" in vars(type(self)))
            return (_new_instance, arguments, *reduced[2:])
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the modules' own forwards."""
        copied, _ = copy_with_same_tensors(self)
        return unfuse(copied)


def _new_instance(cls: type[nn.Module], runs_graph: bool) -> nn.Module:
    made = fused_class(cls, runs_graph)
    return made.__new__(made)


@functools.cache
def fused_class(cls: type[nn.Module], runs_graph: bool) -> type[nn.Module]:
    """``cls`` with :class:`FusedModule`; its forward runs a graph, or is the one of ``cls``."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body: dict[str, Any] = {**names, "_unfused": cls}
    if runs_graph:
        own_forward = cls.forward

        @functools.wraps(own_forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fusion = self.__dict__.get(_FUSION)
            if fusion is None or has_global_module_hooks() or _is_traced(args, kwargs):
                return own_forward(self, *args, **kwargs)
            called: list[Any] = [None] * len(fusion.program.modules)
            if not fusion.inside.find(self, called):
                return own_forward(self, *args, **kwargs)
            return fusion.program.run(self, *called, *args, **kwargs)

        body["forward"] = forward
    made: Any = type(cls)(cls.__name__, (FusedModule, cls), body)
    return made


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tool records what the modules do: it is to see the modules."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
    )


def run_graph(module: nn.Module, fusion: Fusion) -> None:
    """Makes ``module`` run a graph; it stays the same object."""
    vars(module)[_FUSION] = fusion
    change_class(module, fused_class(type(module), True))


def be_undoable(module: nn.Module) -> None:
    """Gives ``module`` the method ``unfuse``."""
    if not isinstance(module, FusedModule | torch.jit.ScriptModule):
        change_class(module, fused_class(type(module), False))


def unfuse(model: nn.Module) -> nn.Module:
    """Gives all modules in ``model`` the forwards that they had before fusing."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            vars(module).pop(_FUSION, None)
            change_class(module, module._unfused)
    return model
