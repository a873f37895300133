"""Guards: whether modules are still what they were when their forwards became part of a graph.

A graph does the work of several forwards. It is right as long as nothing that these forwards depend
on has changed: the children of each module, the attributes that its forward reads, the functions,
classes and constants that it names, and that there are no hooks, which a call would run and a graph
would not.
"""

from __future__ import annotations

import types
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._compat.modules import INTERNALS, children_of, is_hooked, tensors_of
from .contents import ABSENT, BY_VALUE, contents
from .names import Names
from .watch import AS_TEXT


@dataclass
class Guard:
    """What a module was like when its forward became part of a graph.

    A deep copy of the module copies its guard too, so that the guard of the copy refers to the
    attributes of the copy.
    """

    cls: type[nn.Module]
    children: tuple[str, ...]  #: names, in order
    #: Name, value, and what the value holds.
    attributes: list[tuple[str, Any, Any]]
    called: list[tuple[str, int]]  #: children that the graph calls: name, index
    inside: list[tuple[str, Guard]]  #: children whose forward is part of the graph
    #: Names of its own parameters and buffers, and which of them are None
    tensors: tuple[tuple[str, bool], ...]
    #: dtype, device and requires_grad of all parameters, where the code reads such; of a root alone
    traits: tuple[Any, ...] | None
    #: Whether the code asks for a module's mode: then all must be in the same one; of a root alone
    one_mode: bool
    outside: Names | None = None  #: what the code names outside of the modules; of a root alone

    def check(self, module: nn.Module, called: list[Any]) -> bool:
        """Whether nothing has changed in ``module``. Puts the modules that the graph calls into
        ``called``, each at its index."""
        state = module.__dict__
        children = children_of(module)
        if tuple(children) != self.children:
            return False
        for name, value, inside in self.attributes:
            now = state.get(name, ABSENT)
            if now is not value and not (type(now) in BY_VALUE and now == value):
                return False
            if inside is not None and contents(now) != inside:
                return False
        if self.one_mode and any(m.training is not module.training for m in module.modules()):
            return False
        if _own_tensors(module) != self.tensors:
            return False
        if self.traits is not None and _traits(module) != self.traits:
            return False
        if self.outside is not None and not self.outside.unchanged():
            return False
        for name, index in self.called:
            called[index] = children[name]
        for name, guard in self.inside:
            child = children[name]
            if type(child) is not guard.cls or is_hooked(child) or not guard.check(child, called):
                return False
        return True


_TRAITS = frozenset({"dtype", "device", "requires_grad"})


def _own_tensors(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    parameters, buffers = tensors_of(module)
    if not parameters and not buffers:  # a container
        return ()
    return tuple((name, t is None) for held in (parameters, buffers) for name, t in held.items())


def _traits(module: nn.Module) -> tuple[Any, ...]:
    return tuple((p.dtype, p.device, p.requires_grad) for p in module.parameters())


def make_guard(
    module: nn.Module,
    guarded: Set[str],
    called: dict[str, int],
    names: Set[str],
    path: str = "",
) -> Guard:
    """The guard of ``module`` as it is now.

    Args:
        module: the root of the graph, or a module inside of it.
        guarded: paths of the modules that must not change.
        called: paths of the modules that the graph calls -> their index.
        names: names in the code of the forwards. Attributes of these names are guarded.
        path: of ``module``, from the root.
    """
    state = vars(module)
    attributes = [
        (name, state.get(name, ABSENT), contents(state.get(name)))
        for name in sorted({name.removeprefix(AS_TEXT) for name in names})
        if name not in INTERNALS
        and not name.startswith("__")
        and (name in state or _is_default(module, name) or AS_TEXT + name in names)
    ]
    held = children_of(module)
    children = [(name, f"{path}.{name}".strip("."), child) for name, child in held.items()]
    return Guard(
        type(module),
        tuple(held),
        attributes,
        [(name, called[place]) for name, place, _ in children if place in called],
        [
            (name, make_guard(child, guarded, called, names, place))
            for name, place, child in children
            if child is not None and place in guarded
        ],
        _own_tensors(module),
        _traits(module) if not path and not _TRAITS.isdisjoint(names) else None,
        not path and "training" in names,
    )


def _is_default(module: nn.Module, name: str) -> bool:
    """Whether the class has a value of this name, which an attribute of the instance may hide."""
    value = getattr(type(module), name, None)
    if isinstance(value, types.FunctionType):  # a method
        return not value.__module__.startswith("torch.")
    return isinstance(value, bool | int | float | str | tuple | list)
