"""Values of Python among the arguments in a graph: which of them its code gives as they were."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch

_PLAIN: Any = (bool, int, float, complex, str)
_CONTAINERS = (dict, list, tuple, set, frozenset)


def is_kept(value: Any, exact: bool) -> bool:
    """Whether the code of a graph gives this value, or one with the same effect.

    exact: whether the type of a number or of a size counts. Torch's functions take numbers of numpy
    as Python's, and sizes as tuples.
    """
    cls = type(value)
    if isinstance(value, enum.Enum):
        return True
    if isinstance(value, _PLAIN):
        return cls in _PLAIN or (not exact and cls.__module__ == "numpy")
    if isinstance(value, _CONTAINERS):
        if cls is torch.Size:
            return not exact
        return cls in (dict, list, tuple) or (hasattr(value, "_fields") and _is_made_of(value))
    return isinstance(value, type) or not dataclasses.is_dataclass(cls) or _is_made_of(value)


def plain(value: Any) -> Any:
    """The value that the graph's code has in the place of a kept one."""
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
        return next(kind for kind in _PLAIN if isinstance(value, kind))(value)
    return tuple(value) if type(value) is torch.Size else value


def _is_made_of(value: Any) -> bool:
    """Whether a named tuple or a dataclass holds just what its class is called with. The graph's
    code makes it again from what it holds, which a constructor of its own would change again."""
    cls: Any = type(value)
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        names = {field.name for field in fields if field.init}
        settings: Any = cls.__dataclass_params__
        own = ["__post_init__", "__new__"] + ([] if settings.frozen else ["__setattr__"])
        return (
            settings.init
            and len(names) == len(fields) == len(getattr(value, "__dict__", names))
            and all(getattr(cls, name, None) is getattr(object, name, None) for name in own)
        )
    for base in cls.__mro__:
        if "_fields" in vars(base):
            return True
        if "__new__" in vars(base) or "__init__" in vars(base):
            return False
    return True
