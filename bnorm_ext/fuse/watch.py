"""Detecting, while a forward runs, side effects that a graph would not repeat, and answers that it
would freeze.

Python's profiler hook reports every call in the current thread. Nothing in torch is patched, so
other threads may train, trace or draw random numbers meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import random
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from .bytecode import (
    Questions,
    asks_for_types,
    computes_names,
    handles_exceptions,
    questions,
)
from .effects import (
    BUILTINS,
    BUILTINS_OF_OTHERS,
    CALLS,
    CALLS_MODULE,
    CLOCK,
    EXACT_TYPE,
    HANDLES,
    MAKES_MODULE,
    NOW,
    OUTPUT,
    PLACES,
    QUESTIONS,
    READS_ENVIRONMENT,
    READS_MODULE,
    SEEDING,
    SEEDS,
    TYPE_QUESTIONS,
    code_of,
    shared,
)  # fmt: skip
from .process_state import DRAWS

_NOT_THE_FORWARDS = ("torch", "bnorm_ext")
# With what torch uses as if it were in there.
_STANDARD = sys.stdlib_module_names | {"typing_extensions"}

#: In front of a name that the code has as a text.
AS_TEXT = "'"
#: Instead of the names that the code computes.
ANY_NAME = "*"


@dataclass
class Seen:
    """The code outside of torch and of this package that ran."""

    #: All names that the code uses; texts that could be names, as for ``getattr``, with AS_TEXT in
    #: front.
    names: set[str] = field(default_factory=set)
    #: The code, and its global variables.
    ran: dict[types.CodeType, dict[str, Any]] = field(default_factory=dict)


class Observer(Protocol):
    """Who wants to know."""

    seen: Seen

    def fault(self, what: str) -> BaseException:
        """The exception for a side effect; ``what`` says what the code does."""

    def answers(self, asked: Questions, variables: dict[str, Any]) -> None:
        """A function ends that has asked for this; ``variables``: its own."""

    def reads(self, module: torch.nn.Module, name: str) -> None:
        """The code has read a child, a parameter or a buffer of a module."""

    def attributes(self, names: Iterable[str]) -> Iterable[Any]:
        """The attributes of these names that the module whose code runs has in Python."""

    def is_unseen(self, value: Any) -> bool:
        """Whether what changes in the object would not be seen."""

    def makes(self, module: torch.nn.Module) -> None:
        """The code makes a module."""

    def runs(self, module: torch.nn.Module, forward: bool) -> None:
        """The code calls a module; ``forward``: or runs its forward."""


@contextlib.contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """A context that raises ``observer.fault(text)`` just before the code in it has a side effect.

    The profiler hook ends with the first exception that it raises. One fault is enough: ``fault``
    has noted it, even if the code catches the exception.

    What runs inside of a garbage collection is not the code's: finalizers of objects that anybody
    left behind earlier, which may close files, warn or log, and callbacks that read the clock.
    """
    functions = {code_of(cls.forward): cls.__name__ for cls in _subclasses(torch.autograd.Function)}
    seen, fault = observer.seen, observer.fault

    def called_python(frame: types.FrameType) -> None:
        code = frame.f_code
        if code is READS_MODULE:
            if not _is_torchs(frame.f_back):
                observer.reads(frame.f_locals["self"], frame.f_locals["name"])
            return
        if code is MAKES_MODULE:
            observer.makes(frame.f_locals["self"])
            return
        if code is CALLS_MODULE or code.co_name == "forward":
            called: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
            if issubclass(type(called), torch.nn.Module):
                observer.runs(called, forward=code is not CALLS_MODULE)
        if code in CALLS:
            raise fault(CALLS[code])
        if code in QUESTIONS and _is_forwards(frame.f_back):
            raise fault(QUESTIONS[code])
        if code is READS_ENVIRONMENT and not _is_torchs(_beyond_the_library(frame)):
            raise fault("reads environment variables, which tracing would freeze")
        if code in TYPE_QUESTIONS and not _is_torchs(frame.f_back) and _has_values(frame):
            raise fault("asks for the type of a value, which tracing would decide")
        module = str(frame.f_globals.get("__name__"))
        did = PLACES.get((module, code.co_name)) or PLACES.get((module, None))
        if did is not None and not _is_torchs(_beyond_the_library(frame.f_back)):
            raise fault(did)
        if code in functions:
            raise fault(f"uses the autograd function {functions[code]}")
        if code in seen.ran or _is_torchs(_beyond_the_library(frame)):
            return
        standard = _is_standard(frame)
        if not standard and handles_exceptions(code):
            raise fault(HANDLES)
        if not standard and asks_for_types(code):
            raise fault(EXACT_TYPE)
        scope = frame.f_globals
        variables = (frame.f_locals.get(name) for name in code.co_freevars)
        outside = () if standard else (*map(scope.get, code.co_names), *variables)
        own = () if standard else tuple(observer.attributes(code.co_names))
        for value in (*outside, *own):
            what = shared(value)
            if what is not None:
                where = "" if any(value is held for held in own) else " outside of the module"
                raise fault(f"uses {what}{where}")
            if observer.is_unseen(value):
                kind = type(value).__name__
                raise fault(f"uses a {kind}, which cannot be copied to see what changes in it")
        seen.ran[code] = scope
        seen.names.update(code.co_names)
        for constant in () if standard else code.co_consts:
            if isinstance(constant, str) and constant.isidentifier():
                seen.names.add(AS_TEXT + constant)
        if not standard and computes_names(code):
            seen.names.add(ANY_NAME)

    def called_builtin(frame: types.FrameType, called: Any) -> None:
        owner = getattr(called, "__self__", None)
        if isinstance(owner, random.Random):
            raise fault(DRAWS)
        if isinstance(owner, torch.Generator) and called.__name__ in SEEDING:
            raise fault(SEEDS)
        if isinstance(owner, io.IOBase) and called.__name__ in ("write", "writelines", "truncate"):
            raise fault("writes a file, which a graph would not do")
        if type(owner).__module__ in OUTPUT:
            raise fault(OUTPUT[type(owner).__module__])
        if isinstance(owner, ContextVar) and not _is_torchs(frame):
            raise fault("uses a context variable")
        if called in BUILTINS:
            raise fault(BUILTINS[called])
        if called in BUILTINS_OF_OTHERS and not _is_torchs(_beyond_the_library(frame)):
            raise fault(BUILTINS_OF_OTHERS[called])
        if called in QUESTIONS and _is_forwards(frame):
            raise fault(QUESTIONS[called])
        if isinstance(owner, type):
            # Since torch 2.14 `apply` is written in C, so that no Python code of it is entered.
            if issubclass(owner, torch.autograd.Function):
                raise fault(f"uses the autograd function {owner.__name__}")
            if issubclass(owner, datetime.date) and called.__name__ in NOW:
                raise fault(CLOCK)

    thread, collecting = threading.get_ident(), False

    def before_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting
        if phase == "start" and threading.get_ident() == thread:
            collecting = True

    def after_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting
        if phase == "stop" and threading.get_ident() == thread:
            collecting = False

    def watch(frame: types.FrameType, event: str, argument: Any) -> None:
        if collecting:
            return
        if event == "call":
            called_python(frame)
        elif event == "c_call":
            called_builtin(frame, argument)
        elif event == "return" and not _is_torchs(frame):
            asked = questions(frame.f_code)
            if asked:
                observer.answers(asked, frame.f_locals)

    # The first and the last, so that the callbacks of others run between them.
    gc.callbacks.insert(0, before_collection)
    gc.callbacks.append(after_collection)
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.callbacks.remove(before_collection)
        gc.callbacks.remove(after_collection)


def is_watched() -> bool:
    """Whether the profiler hook of this thread is there. It goes when it raises."""
    return sys.getprofile() is not None


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """A context in ``watching`` in which nothing is a side effect."""
    hook = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(hook)


def _is_torchs(frame: types.FrameType | None) -> bool:
    """Whether the code is torch's or this package's, rather than a forward's."""
    return frame is None or _package(frame) in _NOT_THE_FORWARDS


def _is_forwards(frame: types.FrameType | None) -> bool:
    """Whether the code is a forward's or what it calls, but of no library."""
    return frame is not None and not _is_torchs(frame) and not _is_standard(frame)


def _is_standard(frame: types.FrameType) -> bool:
    package = _package(frame)
    return package != "__main__" and package in _STANDARD


def _package(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _beyond_the_library(frame: types.FrameType | None) -> types.FrameType | None:
    """The innermost frame that is not of Python's standard library."""
    while frame is not None and _is_standard(frame):
        frame = frame.f_back
    return frame


def _has_values(frame: types.FrameType) -> bool:
    return any(issubclass(type(value), fx.Proxy) for value in frame.f_locals.values())


def _subclasses(cls: type) -> Iterator[Any]:
    subclasses: list[Any] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)
