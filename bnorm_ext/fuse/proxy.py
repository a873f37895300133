"""The proxies that a forward gets in place of tensors while it is traced.

A forward may ask a proxy what only the value itself can answer: its type, its text, whether it has
some attribute. The proxies of torch.fx answer some of these questions, and the answer would be
frozen into the graph. Here each of them is a fault that the tracer notes.
"""

from __future__ import annotations

import dis
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, fx

from .bytecode import compares_identity

_OWN_NAMES = ("tracer", "node", "root", "attr", "_node")
_KNOWN_ATTRIBUTES = frozenset({*dir(Tensor), *dir(list), *dir(dict)})


class Unfit(BaseException):
    """A forward does something that a graph cannot reproduce; the text says what.

    No ``Exception``, so that hardly any forward handles it and goes on: a side effect that follows
    might not be noticed."""


def _asked_by_torch() -> bool:
    name = sys._getframe(2).f_globals.get("__name__", "")
    return bool(name.split(".")[0] == "torch" or name.startswith(__package__))


def _is_read_by_name(frame: types.FrameType) -> bool:
    """Whether the code that runs in the frame reads an attribute, as ``x.name`` does; if not, it
    calls ``getattr`` or ``hasattr``."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("LOAD_ATTR", "LOAD_METHOD"))


class Value(fx.Proxy):
    """A value that is computed when the graph runs."""

    def _refuse(self, what: str) -> NoReturn:
        raise self.tracer.fault(what)  # type: ignore[attr-defined]

    def __getattr__(self, k: str) -> Attribute:
        frame = sys._getframe(1)
        if k not in _KNOWN_ATTRIBUTES or not (_asked_by_torch() or _is_read_by_name(frame)):
            self._refuse(f"asks whether a tensor has an attribute {k}, which tracing would decide")
        if compares_identity(frame.f_code, frame.f_lasti):
            self._refuse(f"asks what {k} of a tensor is, which tracing would decide")
        return Attribute(self, k)

    @property
    def keys(self) -> Any:
        self._refuse("asks for the keys of a mapping, which tracing would freeze")

    def __hash__(self) -> int:
        if not _asked_by_torch():
            self._refuse("looks up a value in a dictionary or set, which tracing would decide")
        return id(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_NAMES:
            self._refuse(f"assigns to the attribute {name} of a tensor")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _asked_by_torch():
            self._refuse("asks for the type of a value (isinstance), which tracing would decide")
        return type(self)

    def __str__(self) -> str:
        if not _asked_by_torch():
            self._refuse("prints or formats a tensor, which a graph would not do")
        return super().__repr__()

    __repr__ = __str__

    def __len__(self) -> int:
        self._refuse("asks for the length of a tensor, which tracing would freeze")

    def __int__(self) -> int:
        self._refuse("makes a Python number of a tensor, which tracing would freeze")

    __index__ = __float__ = __complex__ = __int__


class Attribute(Value, fx.proxy.Attribute):
    """An attribute of a traced value, or a method that is about to be called."""


def _define(name: str, function: Callable[..., Any]) -> None:
    def in_place(self: fx.Proxy, *others: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, *others), {})

    setattr(Value, f"__{name}__", in_place)


# The proxies of torch.fx do not define these and record ``x += y`` as ``x = x + y``.
for _name in fx.graph.inplace_methods:
    _define(_name, getattr(operator, _name))
