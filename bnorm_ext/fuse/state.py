"""Values of any kind, before and after a forward ran: whether they changed, and undoing it."""

from __future__ import annotations

import collections
import copy
import enum
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Packages whose functions and classes are not searched, because they hold no state of one model.
_LIBRARIES = frozenset({"torch", "torchvision", "numpy", "bnorm_ext", *sys.stdlib_module_names})
_CONTAINERS = (list, dict, set, bytearray, collections.deque)
_IMMUTABLE = (tuple, frozenset, bytes, str, types.FunctionType, type, types.ModuleType)


def is_library(name: str | None) -> bool:
    """Whether a Python module of this name belongs to one of those packages."""
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
    if isinstance(a, (*_CONTAINERS, tuple)):
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


def is_own_copy(value: Any, copied: Any) -> bool:
    """Whether the deep copy of an object of somebody's class is the object itself, as its class may
    have it: what changes in it changes in both."""
    known = is_library(type(value).__module__)
    return copied is value and not known and not isinstance(value, enum.Enum | Tensor | nn.Module)


def _copy_values(held: dict[Any, Any]) -> bool:
    """Puts copies in the place of the values of a dictionary; returns whether all can be copied."""
    try:
        dict.update(held, {key: copy.deepcopy(value) for key, value in dict.items(held)})
    except Exception:
        return False
    return True


class Snapshot:
    """A value, and what it and everything in it was like at first."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.then = value
        #: Pairs of the objects in the value and their copies.
        self.pairs: list[tuple[Any, Any]] = []
        self.seen = True  #: whether changes of it would be seen
        memo: dict[int, Any] = {}
        try:
            self.then = copy.deepcopy(value, memo)
        except Exception:  # something in it cannot be copied: changes inside of that are not seen
            self.seen = False
            if isinstance(value, _CONTAINERS):
                self.then = copy.copy(value)
                self.pairs = [(value, self.then)]
            if isinstance(value, dict):
                self.seen = _copy_values(self.then)
            return
        self.seen = not is_own_copy(value, self.then)
        kept = memo.get(id(memo), ())  # deepcopy keeps the originals alive in there
        self.pairs = [(held, memo[id(held)]) for held in kept if id(held) in memo]

    def changed(self) -> bool:
        return not same(self.value, self.then)

    def put_back(self) -> Any:
        """Gives all objects in the value their contents back, in place. What cannot be changed in
        place, such as an iterator, is replaced by its copy.

        Returns:
            The value, or its copy.
        """
        originals = {id(then): now for now, then in self.pairs if _has_contents(now)}

        def original(then: Any) -> Any:
            return originals.get(id(then), then)

        for now, then in self.pairs:
            _put_back(now, then, original)
        if id(self.then) in originals or self.then is self.value:
            return self.value
        return copy.deepcopy(self.then)  # of which the forward may change another one


def _slots(value: Any) -> Iterator[str]:
    for cls in type(value).__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__"):
                hidden = name.startswith("__") and not name.endswith("__")
                yield f"_{cls.__name__.lstrip('_')}{name}" if hidden else name


def _numpys(value: Any, name: str) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy.random, name))


def _has_contents(value: Any) -> bool:
    """Whether ``_put_back`` can change the value, or there is nothing of its own to change."""
    kinds = (*_CONTAINERS, *_IMMUTABLE, Tensor, torch.Generator, random.Random)
    return (
        isinstance(value, kinds)
        or is_array(value)
        or _numpys(value, "Generator")  # it holds a BitGenerator
        or _numpys(value, "BitGenerator")
        or _numpys(value, "RandomState")
        or hasattr(value, "__dict__")
        or any(True for _ in _slots(value))
    )


def _put_back(now: Any, then: Any, original: Callable[[Any], Any]) -> None:
    """Gives the object ``now`` the contents of its copy ``then``.

    ``original``: the object of which something in ``then`` is a copy.
    """
    if isinstance(now, list):
        now[:] = map(original, then)
    elif isinstance(now, dict):
        pairs = [(original(key), original(value)) for key, value in then.items()]
        now.clear()
        now.update(pairs)
    elif isinstance(now, set):
        now.clear()
        now.update(map(original, then))
    elif isinstance(now, collections.deque):
        now.clear()
        now.extend(map(original, then))
    elif isinstance(now, bytearray):
        now[:] = then
    elif is_array(now):
        now[...] = then
    elif isinstance(now, Tensor):
        if not _same_tensors(now, then):
            with torch.no_grad():
                now.copy_(then)
    elif isinstance(now, torch.Generator):
        now.set_state(then.get_state())
    elif isinstance(now, random.Random):
        now.setstate(then.getstate())
    elif _numpys(now, "BitGenerator"):
        now.state = then.state
    elif _numpys(now, "RandomState"):
        now.set_state(then.get_state())
    if isinstance(now, _IMMUTABLE):
        return
    if hasattr(now, "__dict__"):
        held = {key: original(value) for key, value in vars(then).items()}
        vars(now).clear()
        vars(now).update(held)
    for name in _slots(now):
        if hasattr(then, name):
            object.__setattr__(now, name, original(getattr(then, name)))
