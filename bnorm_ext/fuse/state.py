"""Detecting, and undoing, what a forward has changed besides computing its result.

A forward may count its calls, keep its input, or append to a list of the Python module that defines
it. A graph would do none of that, so such a forward must not become part of a graph. Tracing has to
run it to find out; what the run has changed outside of the traced copy is restored here.
"""

from __future__ import annotations

import collections
import copy
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Packages whose functions and classes are not searched, because they hold no state of one model.
_LIBRARIES = frozenset({"torch", "torchvision", "numpy", "bnorm_ext", *sys.stdlib_module_names})
_MAX_FUNCTIONS = 300
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_ABSENT: Any = object()


def _is_library(name: str | None) -> bool:
    # __main__ is a user's script, although it is a name of the standard library too.
    return name is not None and name != "__main__" and name.split(".")[0] in _LIBRARIES


def is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def same(a: Any, b: Any, ignored: frozenset[str] = frozenset()) -> bool:
    """Whether two objects, one a deep copy of the other, still hold the same values.

    ``ignored``: names of attributes of modules that are not compared.
    """
    return _same(a, b, ignored, set())


def _same(a: Any, b: Any, ignored: frozenset[str], seen: set[tuple[int, int]]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if (id(a), id(b)) in seen:  # an object that contains itself
        return True
    seen.add((id(a), id(b)))
    if isinstance(a, Tensor):
        return _same_tensors(a, b)
    if is_array(a):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and (
            a == b or _same(sorted(map(repr, a)), sorted(map(repr, b)), ignored, seen)
        )
    if isinstance(a, list | tuple | collections.deque):
        if len(a) != len(b) or not all(
            _same(x, y, ignored, seen) for x, y in zip(a, b, strict=True)
        ):
            return False
    elif isinstance(a, dict):
        if len(a) != len(b) or not all(
            _same(k, m, ignored, seen) and _same(v, w, ignored, seen)
            for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        ):
            return False
    elif isinstance(a, int | float | complex | str | bytes | bytearray):
        return bool(a == b or (a != a and b != b))
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, random.Random):
        return bool(a.getstate() == b.getstate())
    if hasattr(a, "__dict__"):
        mine, theirs = vars(a), vars(b)
        if isinstance(a, nn.Module):
            mine = {k: v for k, v in mine.items() if k not in ignored}
            theirs = {k: v for k, v in theirs.items() if k not in ignored}
        return _same(mine, theirs, ignored, seen)
    if isinstance(a, (*_MUTABLE, tuple)):
        return True
    return _same_by_pickling(a, b, ignored, seen)


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if a.is_meta or a.layout is not torch.strided:
        return a.is_meta
    return torch.equal(a.detach(), b.detach()) or bool(
        torch.allclose(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)
    )


def _same_by_pickling(a: Any, b: Any, ignored: frozenset[str], seen: set[tuple[int, int]]) -> bool:
    """Compares iterators, counters and other objects written in C by what pickle makes of them."""
    try:
        mine, theirs = a.__reduce_ex__(4), b.__reduce_ex__(4)
    except Exception:  # a lock, a socket or a generator has no value to compare
        return True
    if isinstance(mine, str):
        return bool(mine == theirs)

    def lists(parts: tuple[Any, ...]) -> list[Any]:
        return [list(p) if isinstance(p, types.GeneratorType) else p for p in parts]

    return _same(lists(mine), lists(theirs), ignored, seen)


class Outside:
    """The state that the code of a model can reach outside of the model: globals of Python modules,
    attributes of classes, variables in closures. A copy of the model shares it with the model."""

    def __init__(self, model: nn.Module) -> None:
        self._cells: list[tuple[types.CellType, Any, Any]] = []  # cell, value, copy of the value
        self._names: list[tuple[Any, str, Any, Any]] = []  # holder, name, value, copy of the value
        self._seen: set[int] = set()
        self._left = _MAX_FUNCTIONS
        for cls in {type(module) for module in model.modules()}:
            self._visit_class(cls)

    def _visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self._seen or _is_library(base.__module__):
                continue
            self._seen.add(id(base))
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
        if id(function) in self._seen or self._left == 0 or _is_library(function.__module__):
            return
        self._seen.add(id(function))
        self._left -= 1
        names = set(_names(function.__code__))
        for name in sorted(names & function.__globals__.keys()):
            self._visit(function.__globals__, name, function.__globals__[name], names)
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(value, types.FunctionType):
                self._visit_function(value)
            elif not isinstance(value, type | nn.Module):
                self._cells.append((cell, value, _copied(value)))
        for value in function.__defaults__ or ():
            if isinstance(value, _MUTABLE) or is_array(value):
                self._names.append((None, "", value, _copied(value)))

    def _visit(self, holder: Any, name: str, value: Any, names: set[str]) -> None:
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, types.ModuleType):
            if id(value) not in self._seen and not _is_library(value.__name__):
                self._seen.add(id(value))
                for inner in sorted(names & vars(value).keys()):
                    self._visit(vars(value), inner, vars(value)[inner], names)
        else:
            self._keep(holder, name, value)

    def _keep(self, holder: Any, name: str, value: Any) -> None:
        self._names.append((holder, name, value, _copied(value)))

    def restore(self) -> list[str]:
        """Restores what has changed; returns the names of it."""
        changed = []
        for cell, value, then in self._cells:
            if cell.cell_contents is not value:
                cell.cell_contents = value
                changed.append("a variable of an enclosing function")
            if not same(value, then):
                _put_back(value, then)
                changed.append("a variable of an enclosing function")
        for holder, name, value, then in self._names:
            now = value if holder is None else _held(holder, name)
            if now is not value:
                changed.append(name)
                if isinstance(holder, dict):
                    holder[name] = value
                else:
                    setattr(holder, name, value)
            if not same(value, then):
                _put_back(value, then)
                changed.append(name or "a default argument")
        return changed


def _held(holder: Any, name: str) -> Any:
    return (holder if isinstance(holder, dict) else vars(holder)).get(name, _ABSENT)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # it cannot be copied: changes inside of it are not seen
        return value


def _put_back(value: Any, then: Any) -> None:
    """Gives ``value`` the contents of its copy ``then``, in place."""
    if isinstance(value, list | bytearray):
        value[:] = then
    elif isinstance(value, dict | set):
        value.clear()
        value.update(then)
    elif isinstance(value, collections.deque):
        value.clear()
        value.extend(then)
    elif is_array(value):
        value[...] = then
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(then)
    if hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
        vars(value).clear()
        vars(value).update(vars(then))
