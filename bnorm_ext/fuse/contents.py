"""What containers and objects hold, in a form that can be compared and copied."""

from __future__ import annotations

import enum
import functools
import types
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

#: In place of a value that is not there.
ABSENT = "(absent)"
#: Values of these types are compared by value, all others by identity.
BY_VALUE = (bool, int, float, str, tuple, types.MethodType)
_DEPTH = 4  # of objects and containers in each other
# Where that is more values than these, only so deep.
_MANY, _LESS_DEPTH = 1000, 2
# Tuples, because Dynamo of torch 2.8 cannot trace a test against a union.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OPAQUE = (
    *(nn.Module, Tensor, type, types.ModuleType),
    *_FUNCTIONS,
)
# Dynamo of torch before 2.12 cannot list the attributes of an object, so that one which was added
# is not seen there.
_UNLISTED = torch.__version__ < "2.12"
# They stay the same objects, or equal ones, in a copy and in a pickle.
_CONSTANTS = (bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SETS = (set, frozenset)
_CONTAINERS = (list, tuple, dict, *_SETS, deque)


def is_as_before(now: Any, value: Any) -> bool:
    """Whether this is the value from before, or an equal one of a type that counts by value."""
    if type(value) is tuple:  # not by `==`, which arrays and tensors in it do not have
        if type(now) is not tuple or len(now) != len(value):
            return False
        return all(is_as_before(now[i], value[i]) for i in range(len(value)))
    return now is value or (
        type(now) in BY_VALUE and type(now) is type(value) and bool(now == value)
    )


class _TooLarge(Exception):
    """It holds more than may be compared."""


def contents(value: Any, most: float = float("inf"), like: Any = None) -> Any:
    """What a container or an object of somebody's class holds, to be compared by value; None for
    anything else, and for what holds more than ``most`` values.

    like: what it held. If this is given, only the attributes that objects had are looked at.
    """
    for depth, limit in ((_DEPTH, min(most, _MANY)), (_LESS_DEPTH, most)):
        try:
            return _contents(value, depth, [limit], like)
        except _TooLarge:
            pass
    return None


def holds(value: Any, inside: Any, most: float = float("inf")) -> bool:
    """Whether ``inside`` is what it holds, by ``contents(value, most)``; of a function, what its
    attributes hold."""
    like = inside if _UNLISTED and torch.compiler.is_dynamo_compiling() else None
    if type(value) is types.FunctionType:
        value = _attributes(value, like)
    return bool(contents(value, most, like) == inside)


def _contents(value: Any, depth: int, left: list[float], like: Any = None) -> Any:
    if depth == 0 or isinstance(value, _OPAQUE):
        return None
    if not isinstance(value, _CONTAINERS):
        held = _attributes(value, like)
        return _contents(held, depth, left, like) if held else None
    left[0] -= len(value)
    if left[0] < 0:
        raise _TooLarge
    if isinstance(value, dict):
        named = _by_name(like)
        return tuple((key, _held(item, depth, left, named.get(key))) for key, item in value.items())
    if isinstance(value, _SETS):
        return frozenset(value)
    before = like if isinstance(like, tuple) else ()
    return tuple(
        _held(item, depth, left, before[i] if i < len(before) else None)
        for i, item in enumerate(value)
    )


def _attributes(value: Any, like: Any) -> dict[str, Any]:
    if like is None:
        return dict(getattr(value, "__dict__", {}))
    return {name: getattr(value, name, ABSENT) for name in _by_name(like)}


def _by_name(like: Any) -> dict[Any, Any]:
    """What a dictionary or an object held; nothing if it was something else."""
    pairs = like if isinstance(like, tuple) else ()
    return {pair[0]: pair[1] for pair in pairs if isinstance(pair, tuple) and len(pair) == 2}


def _held(value: Any, depth: int, left: list[float], like: Any = None) -> Any:
    if type(value) in BY_VALUE and type(value) not in (tuple, types.MethodType):
        return value
    if isinstance(value, _CONSTANTS):
        return value
    named = _named(value, depth, left)
    if named is not None:
        return named
    inside = _contents(value, depth - 1, left, like)
    # What holds nothing that can be compared counts by what it is. Modules and tensors that are in
    # a container are not copied with the identity that they had.
    return type(value).__name__ if inside is None else inside


def _named(value: Any, depth: int, left: list[float]) -> Any:
    """A function, a class or a member of an enumeration by its name, of which functions without a
    name of their own have the same: they count by their code too. A number of numpy by its value.
    None for anything else."""
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return None if depth == 0 else tuple(_held(part, depth - 1, left) for part in parts)
    if isinstance(value, enum.Enum):
        return type(value).__qualname__, value.name
    if isinstance(value, (type, *_FUNCTIONS)):
        code = getattr(value, "__code__", None)
        body = None if code is None else (code.co_code, code.co_firstlineno, code.co_names)
        return getattr(value, "__module__", None), value.__qualname__, body
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return type(value).__name__, value.item()
    return None
