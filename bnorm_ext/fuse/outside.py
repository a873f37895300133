"""Detecting, and undoing, what a forward has changed besides computing its result.

A forward may count its calls, keep its input, or append to a list of the Python module that defines
it. A graph would do none of that, so such a forward must not become part of a graph. Tracing has to
run it to find out; what the run has changed outside of the traced copy is restored here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .state import Snapshot, is_library

_MAX_FUNCTIONS = 300
_ABSENT: Any = object()


class Outside:
    """The state that the code of a model can reach outside of the model: globals of Python modules,
    attributes of classes and functions, variables in closures. A copy of the model shares it with
    the model."""

    def __init__(self, model: nn.Module, shared: Iterable[int]) -> None:
        """``shared``: ids of attributes of modules that the copy which is traced has too."""
        self._cells: list[tuple[types.CellType, Snapshot]] = []
        self._names: list[tuple[Any, str, Snapshot]] = []  # holder, name, value
        self._contents: list[tuple[str, Snapshot]] = []  # what it is, value
        self._absent: list[tuple[dict[str, Any], str]] = []  # globals, a name that is not in there
        self._attributes: list[tuple[type, frozenset[str]]] = []  # class, names of its attributes
        self._seen: set[int] = set()
        self._left = _MAX_FUNCTIONS
        self._unseen = set(shared)  # ids of values of which changes would not be seen
        for cls in {type(module) for module in model.modules()}:
            self._visit_class(cls)
        for module in model.modules():
            for value in vars(module).values():
                if hasattr(type(value), "__deepcopy__") and not is_library(type(value).__module__):
                    self._kept(value)

    def _visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self._seen or is_library(base.__module__):
                continue
            self._seen.add(id(base))
            self._attributes.append((base, frozenset(vars(base))))
            for name, value in list(vars(base).items()):
                if isinstance(value, staticmethod | classmethod):
                    value = value.__func__
                if isinstance(value, property):
                    value = value.fget
                if isinstance(value, types.FunctionType):
                    self._visit_function(value)
                elif not name.startswith("__"):
                    self._keep(base, name, value)

    def _visit_function(self, function: types.FunctionType) -> None:
        if id(function) in self._seen or self._left == 0 or is_library(function.__module__):
            return
        self._seen.add(id(function))
        self._left -= 1
        names = set(_names(function.__code__))
        for name in sorted(names):
            if name in function.__globals__:
                self._visit(function.__globals__, name, function.__globals__[name], names)
            else:
                self._absent.append((function.__globals__, name))
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(value, types.FunctionType):
                self._visit_function(value)
            elif not isinstance(value, type | nn.Module):
                self._cells.append((cell, self._kept(value)))
        attributes = ("an attribute of a function", Snapshot(vars(function)))
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._contents.append(attributes)
        self._contents += [("a default argument", Snapshot(value)) for value in defaults]

    def _visit(self, holder: Any, name: str, value: Any, names: set[str]) -> None:
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, types.ModuleType):
            if id(value) not in self._seen and not is_library(value.__name__):
                self._seen.add(id(value))
                for inner in sorted(names & vars(value).keys()):
                    self._visit(vars(value), inner, vars(value)[inner], names)
        else:
            self._keep(holder, name, value)

    def _keep(self, holder: Any, name: str, value: Any) -> None:
        self._names.append((holder, name, self._kept(value)))

    def _kept(self, value: Any) -> Snapshot:
        kept = Snapshot(value)
        if not kept.seen:
            self._unseen.add(id(value))
        if not isinstance(value, nn.Module):
            self._visit_class(type(value))  # its methods may change attributes of the class
        for function in _functions_in(value):
            self._visit_function(function)
        return kept

    def is_unseen(self, value: Any) -> bool:
        """Whether changes of the value by a forward would not be noticed."""
        return id(value) in self._unseen

    def restore(self) -> list[str]:
        """Restores what has changed; returns the names of it."""
        changed = []
        for cell, kept in self._cells:
            if cell.cell_contents is not kept.value or kept.changed():
                cell.cell_contents = kept.put_back()
                changed.append("a variable of an enclosing function")
        for holder, name, kept in self._names:
            if _held(holder, name) is not kept.value or kept.changed():
                value = kept.put_back()
                if isinstance(holder, dict):
                    holder[name] = value
                else:
                    setattr(holder, name, value)
                changed.append(name)
        for what, kept in self._contents:
            if kept.changed():
                kept.put_back()
                changed.append(what)
        for scope, name in self._absent:
            if name in scope:
                del scope[name]
                changed.append(name)
        for cls, names in self._attributes:
            for name in vars(cls).keys() - names:
                if not name.startswith("__"):
                    delattr(cls, name)
                    changed.append(name)
        return changed


def _held(holder: Any, name: str) -> Any:
    return (holder if isinstance(holder, dict) else vars(holder)).get(name, _ABSENT)


def _functions_in(value: Any, depth: int = 2) -> Iterator[types.FunctionType]:
    """The functions that a container, a method or a partial function holds."""
    if isinstance(value, types.FunctionType):
        yield value
    inside: tuple[Any, ...] = ()
    if isinstance(value, dict):
        inside = tuple(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = tuple(value)
    elif isinstance(value, functools.partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        inside = (value.__func__,)
    for held in inside[:_MAX_FUNCTIONS] if depth else ():
        yield from _functions_in(held, depth - 1)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
