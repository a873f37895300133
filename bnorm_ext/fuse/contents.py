"""What containers and objects hold, in a form that can be compared and copied."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

from torch import Tensor, nn

#: In place of a value that is not there.
ABSENT = "(absent)"
#: Values of these types are compared by value, all others by identity.
BY_VALUE = (bool, int, float, str, tuple, types.MethodType)
_DEPTH = 4
# Tuples, because Dynamo of torch 2.8 cannot trace a test against a union.
_OPAQUE = (
    *(nn.Module, Tensor, type, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
_SETS = (set, frozenset)
_CONTAINERS = (list, tuple, dict, *_SETS, deque)


class _TooLarge(Exception):
    """It holds more than may be compared."""


def contents(value: Any, most: float = float("inf")) -> Any:
    """What a container or an object of somebody's class holds, to be compared by value; None for
    anything else, and for what holds more than ``most`` values."""
    try:
        return _contents(value, _DEPTH, [most])
    except _TooLarge:
        return None


def _contents(value: Any, depth: int, left: list[float]) -> Any:
    if depth == 0 or isinstance(value, _OPAQUE):
        return None
    if not isinstance(value, _CONTAINERS):
        held = getattr(value, "__dict__", None)
        return None if not held else _contents(dict(held), depth - 1, left)
    left[0] -= len(value)
    if left[0] < 0:
        raise _TooLarge
    if isinstance(value, dict):
        return tuple((key, _held(item, depth, left)) for key, item in value.items())
    if isinstance(value, _SETS):
        return frozenset(value)
    return tuple(_held(item, depth, left) for item in value)


def _held(value: Any, depth: int, left: list[float]) -> Any:
    if type(value) in BY_VALUE and type(value) not in (tuple, types.MethodType):
        return value
    inside = _contents(value, depth - 1, left)
    # What holds nothing that can be compared counts by what it is. Modules and tensors that are in
    # a container are not copied with the identity that they had.
    return type(value).__name__ if inside is None else inside
