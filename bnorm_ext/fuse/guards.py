"""Guards: whether modules are still what they were when their forwards became part of a graph.

A graph does the work of several forwards. It is right as long as nothing that these forwards depend
on has changed: the children of each module, the attributes that its forward reads, the functions,
classes and constants that it names, and that there are no hooks, which a call would run and a graph
would not.
"""

from __future__ import annotations

import inspect
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._compat.modules import INTERNALS, OF_ALL, children_of, is_hooked, tensors_of
from .contents import ABSENT, contents, holds, is_as_before
from .names import Names
from .watch import ANY_NAME, AS_TEXT


@dataclass
class Guard:
    """What a module was like when its forward became part of a graph.

    A deep copy of the module copies its guard too, so that the guard of the copy refers to the
    attributes of the copy.
    """

    cls: type[nn.Module]
    children: tuple[str, ...]  #: names, in order
    empty: tuple[str, ...]  #: those of them that are None
    #: Name, value, and what the value holds.
    attributes: list[tuple[str, Any, Any]]
    called: list[tuple[str, int]]  #: children that the graph calls: name, index
    #: Children whose forward is part of the graph, or of which the code has asked something
    inside: list[tuple[str, Guard]]
    #: Names of its own parameters and buffers, and which of them are None
    tensors: tuple[tuple[str, bool], ...]
    #: What the code has asked of parameters and buffers; of a root alone
    traits: list[Trait]
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
        for name in self.empty:
            if children[name] is not None:
                return False
        for name, value, inside in self.attributes:
            now = state.get(name, ABSENT)
            # Dynamo cannot compare tuples by identity.
            if (type(value) is tuple or now is not value) and not is_as_before(now, value):
                return False
            if inside is not None and not holds(now, inside):
                return False
        if self.one_mode and any(m.training is not module.training for m in module.modules()):
            return False
        if _own_tensors(module) != self.tensors:
            return False
        for trait in self.traits:
            if trait.now(module) != trait.value:
                return False
        if self.outside is not None and not self.outside.unchanged():
            return False
        for name, index in self.called:
            called[index] = child = children[name]
            if child is None:
                return False
        for name, guard in self.inside:
            child = children[name]
            cls = type(child)
            if cls is not guard.cls and getattr(cls, "_unfused", None) is not guard.cls:
                return False
            if is_hooked(child) or not guard.check(child, called):
                return False
        return True


@dataclass(frozen=True)
class Trait:
    """What code has asked of a parameter or buffer, besides its values: its shape, say."""

    path: tuple[str, ...]  #: names of the modules that lead to it, and its own
    name: str  #: of the attribute, or of the method, which is called without arguments
    is_method: bool
    value: Any  #: what it was

    def now(self, module: Any) -> Any:
        """What it is, of the tensor in ``module`` that has this path; ABSENT if there is none."""
        tensor = module
        for name in self.path:
            tensor = getattr(tensor, name, None)
        if tensor is None:
            return ABSENT
        value = getattr(tensor, self.name)
        return value() if self.is_method else value


def _own_class(module: nn.Module) -> type[nn.Module]:
    """Its class; of a fused module that which it had before."""
    cls: type[nn.Module] = getattr(type(module), "_unfused", type(module))
    return cls


def _own_tensors(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    parameters, buffers = tensors_of(module)
    if not parameters and not buffers:  # a container
        return ()
    return tuple((name, t is None) for held in (parameters, buffers) for name, t in held.items())


@dataclass(frozen=True)
class Asked:
    """What the code of forwards has asked for while it was traced."""

    #: Names in the code, texts that may be names with AS_TEXT in front.
    names: Set[str]
    #: Paths of the children, parameters and buffers that it has read.
    read: Set[str] = frozenset()
    traits: tuple[Trait, ...] = ()
    kinds: bool = False  #: whether it may have asked a module by isinstance or hasattr


def make_guard(
    module: nn.Module, guarded: Set[str], called: dict[str, int], asked: Asked, path: str = ""
) -> Guard:
    """The guard of ``module`` as it is now.

    Args:
        module: the root of the graph, or a module inside of it.
        guarded: paths of the modules that must not change.
        called: paths of the modules that the graph calls -> their index.
        asked: what of the modules has been asked for. Attributes of these names are guarded.
        path: of ``module``, from the root.
    """
    held = children_of(module)
    children = [(name, f"{path}.{name}".strip("."), child) for name, child in held.items()]
    return Guard(
        _own_class(module),
        tuple(held),
        tuple(name for name, child in held.items() if child is None),
        _attributes(module, asked.names),
        [(name, called[place]) for name, place, _ in children if place in called],
        [
            (name, make_guard(child, guarded, called, asked, place))
            for name, place, child in children
            if child is not None and _is_guarded(child, place, guarded, place in called, asked)
        ],
        _own_tensors(module),
        [] if path else list(asked.traits),
        not path and "training" in asked.names,
    )


def _is_guarded(
    module: nn.Module, path: str, guarded: Set[str], is_called: bool, asked: Asked
) -> bool:
    """Whether the graph is right only as long as this module stays as it is. A graph that calls a
    module calls what has replaced it too, unless the code has asked for more than to call it."""
    if path in guarded:
        return True
    if not is_called:
        return path in asked.read
    # By items: the dictionaries of scripted modules have no other iterator.
    tensors = (name for held in tensors_of(module) for name, _ in held.items())
    return (
        asked.kinds
        or bool(_names_asked(module, asked.names))
        or any(f"{path}.{name}" in asked.read for name in tensors)
    )


def _attributes(module: nn.Module, names: Set[str]) -> list[tuple[str, Any, Any]]:
    """Attributes of a module that have these names: name, value, and what the value holds."""
    state = vars(module)
    return [
        (name, state.get(name, ABSENT), contents(state.get(name)))
        for name in _names_asked(module, names)
    ]


def _names_asked(module: nn.Module, names: Set[str]) -> list[str]:
    """Which of these names are, or may become, attributes of the module."""
    state = vars(module)
    wanted = {name.removeprefix(AS_TEXT) for name in names}
    if ANY_NAME in names:
        wanted |= state.keys() - OF_ALL
    return [
        name
        for name in sorted(wanted)
        if name not in INTERNALS
        and not name.startswith("__")
        and (name in state or _is_default(module, name) or AS_TEXT + name in names)
    ]


def _is_default(module: nn.Module, name: str) -> bool:
    """Whether the class, if it is none of torch's, has a value of this name, which an attribute of
    the instance may hide."""
    for base in type(module).__mro__:
        if name in vars(base):
            settable = not inspect.isdatadescriptor(vars(base)[name])
            return settable and not base.__module__.startswith("torch.")
    return False
