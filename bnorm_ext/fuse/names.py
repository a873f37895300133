"""The names outside of a module that its forward refers to, and whether they still mean the same.

A graph contains what the functions, classes and constants of Python modules were when it was
traced. Each call of a fused module compares them by identity, and small values by value.
"""

from __future__ import annotations

import importlib
import sys
import types
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .bytecode import enclosing_cells, references
from .contents import ABSENT, BY_VALUE, contents, holds, is_as_before
from .watch import AS_TEXT

Scopes = Mapping[types.CodeType, Mapping[str, Any]]
# Objects that hold more values are compared by identity alone: comparing what they hold on each
# call would cost as much as a layer.
_MOST = 100
_COMPARED = (list, dict, tuple, set, frozenset, deque, Namespace)
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names} - {"__main__", "types"})


def _library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES


def _inside(value: Any) -> Any:
    """What it holds, as far as that may change what code does: nothing of a library's objects but
    containers and sets of options, and of a function its attributes."""
    if type(value) is types.FunctionType:
        library = _library(value.__module__ or "")
        return None if library or not vars(value) else contents(vars(value), _MOST)
    if _library(type(value).__module__) and not isinstance(value, _COMPARED):
        return None
    return contents(value, _MOST)


class Names:
    """What some code refers to. It is immutable, so copies of a model share it."""

    def __init__(self, entries: Iterable[tuple[Any, str, Any, Any]], cells: Any = ()) -> None:
        #: Module or class, name, value, and what the value holds.
        self.entries = list(entries)
        #: Variables of enclosing functions, and globals of code that was run by ``exec``: a
        #: function that reads it, value, and what that holds.
        self.cells: list[tuple[Callable[[], Any], Any, Any]] = list(cells)

    def unchanged(self) -> bool:
        for holder, name, value, inside in self.entries:
            now = getattr(holder, name, ABSENT)
            if (type(value) is tuple or now is not value) and not is_as_before(now, value):
                return False
            if inside is not None and not holds(now, inside, _MOST):
                return False
        for read, value, inside in self.cells:
            now = read()
            if (type(value) is tuple or now is not value) and not is_as_before(now, value):
                return False
            if inside is not None and not holds(now, inside, _MOST):
                return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Names:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # What is in `cells` cannot be pickled, nor can the class of the model then.
        rows = []
        for holder, name, value, inside in self.entries:
            place = _place(holder)
            if place is not None:
                small = type(value) in BY_VALUE and type(value) is not types.MethodType
                rows.append((place, name, (value,) if small else (), inside))
        return _load, (rows,)


def _place(holder: Any) -> tuple[str, str] | None:
    """By which names a module or class is found; None if it is not."""
    if isinstance(holder, types.ModuleType):
        place = holder.__name__, ""
    else:
        place = holder.__module__, holder.__qualname__
    return place if _find(place) is holder else None


def _find(place: tuple[str, str]) -> Any:
    module, path = place
    try:
        found: Any = importlib.import_module(module)
        for name in path.split(".") if path else ():
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


def _load(rows: list[tuple[Any, ...]]) -> Names:
    """What the names mean in the process that loads the graph: the functions in it were pickled by
    name too."""
    entries = []
    for place, name, small, inside in rows:
        holder = _find(place)
        if holder is not None:
            value = small[0] if small else getattr(holder, name, ABSENT)
            entries.append((holder, name, value, inside))
    return Names(entries)


def names_of(ran: Scopes, modules: Iterable[nn.Module], names: Iterable[str]) -> Names:
    """What the code of forwards refers to.

    Args:
        ran: the code that ran, with its global variables.
        modules: those whose forward is part of the graph.
        names: all names in the code, texts that may be names among them.
    """
    classes = {type(module) for module in modules}
    classes = {getattr(cls, "_unfused", cls) for cls in classes}
    found: dict[tuple[int, str], tuple[Any, str]] = {}

    def add(holder: Any, name: str) -> None:
        found.setdefault((id(holder), name), (holder, name))

    for cls in classes:
        # torch's layers do not look themselves up by the names of other code.
        theirs = cls.__module__.startswith("torch.")
        for name in {"forward"} if theirs else {"forward", *names}:
            plain = name.removeprefix(AS_TEXT)
            value = getattr(cls, plain, ABSENT)
            # A text may be that of `hasattr`: then what the class does not have counts too.
            wanted = plain != name if value is ABSENT else value is not _of_all(plain)
            if wanted and not plain.startswith("__"):
                add(cls, plain)
                for base in cls.__mro__[1:]:  # which `super()` looks up
                    if plain in vars(base) and not _library(base.__module__):
                        add(base, plain)
    functions = _Functions(classes)
    cells: list[tuple[Callable[[], Any], Any, Any]] = []
    # Twice, because what some code refers to may be the function of other code.
    for _ in range(2):
        cells = []
        for code, scope in ran.items():
            if _is_standard(scope):
                continue
            enclosing = functions.variables(code)
            for name, cell in enclosing:
                if name != "__class__":
                    value = cell.cell_contents
                    cells.append((_reader(cell), value, _inside(value)))
            values = {name: cell.cell_contents for name, cell in enclosing}
            for holder, name in references(code, scope, values):
                if holder is scope:
                    value = scope[name]
                    cells.append((_reader_of_global(scope, name), value, _inside(value)))
                    functions.visit(value)
                else:
                    add(holder, name)
                    functions.visit(getattr(holder, name, None))
    entries = []
    for holder, name in found.values():
        value = getattr(holder, name, ABSENT)
        entries.append((holder, name, value, _inside(value)))
    return Names(entries, cells)


def _of_all(name: str) -> Any:
    return getattr(nn.Module, name, ABSENT)


def _is_standard(scope: Mapping[str, Any]) -> bool:
    name = str(scope.get("__name__")).split(".")[0]
    return name != "__main__" and name in sys.stdlib_module_names


class _Functions:
    """Functions by their code, as far as they are found: only they know their variables of
    enclosing functions."""

    def __init__(self, classes: Iterable[type]) -> None:
        self._by_code: dict[types.CodeType, list[types.FunctionType]] = {}
        for cls in classes:
            for base in cls.__mro__:
                for value in list(vars(base).values()):
                    self.visit(value)

    def visit(self, value: Any) -> None:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType):
            known = self._by_code.setdefault(value.__code__, [])
            if not any(function is value for function in known):
                known.append(value)
                for _, cell in enclosing_cells(value):
                    self.visit(cell.cell_contents)

    def variables(self, code: types.CodeType) -> list[tuple[str, types.CellType]]:
        return [
            pair for function in self._by_code.get(code, ()) for pair in enclosing_cells(function)
        ]


def _reader(cell: types.CellType) -> Callable[[], Any]:
    """A function that reads the variable. torch.compile follows it, but not ``cell_contents``."""
    variable: Any = None

    def read() -> Any:
        return variable

    return types.FunctionType(read.__code__, globals(), "read", None, (cell,))


def _reader_of_global(scope: Mapping[str, Any], name: str) -> Callable[[], Any]:
    def read() -> Any:
        return scope.get(name, ABSENT)

    return read
