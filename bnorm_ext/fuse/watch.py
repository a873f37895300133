"""Detecting, while a forward runs, side effects that a graph would not repeat, and answers that it
would freeze.

Python's profiler hook reports every call in the current thread. Nothing in torch is patched, so
other threads may train, trace or draw random numbers meanwhile.
"""

from __future__ import annotations

import builtins
import contextlib
import datetime
import gc
import logging
import os
import random
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed
from torch.autograd.graph import saved_tensors_hooks

from .bytecode import Questions, asks_for_types, handles_exceptions, questions
from .process_state import DRAWS

_GRADIENTS = "switches gradients on or off"
_SEEDS = "seeds a random number generator"
_CLOCK = "reads the clock, which tracing would freeze"
_FILES = "changes files or starts processes"
_ENVIRONMENT = "changes environment variables"
_HANDLES = "handles exceptions of what it calls, which a graph would not do"
_EXACT_TYPE = "asks for the exact type of a value or a module, which tracing would decide"


def _code(function: Any) -> types.CodeType | None:
    function = getattr(function, "__wrapped__", function)
    return getattr(function, "__code__", None)


# Code of Python functions -> what a forward does that calls them.
_CALLS: dict[types.CodeType | None, str] = {
    _code(torch.autocast.__enter__): "enters the context autocast",
    _code(saved_tensors_hooks.__enter__): "checkpoints, or hooks the tensors saved for backward",
    _code(torch.no_grad.__enter__): _GRADIENTS,
    _code(torch.enable_grad.__enter__): _GRADIENTS,
    _code(torch.set_grad_enabled.__init__): _GRADIENTS,
    _code(torch.inference_mode.__enter__): _GRADIENTS,
    _code(torch.nn.Module.train): "switches modules between training and evaluation",
    _code(torch.manual_seed): _SEEDS,
    _code(torch.seed): _SEEDS,
    _code(torch.set_rng_state): _SEEDS,
    _code(torch.random.fork_rng): _SEEDS,
    _code(torch.cuda.manual_seed): _SEEDS,
    _code(torch.cuda.manual_seed_all): _SEEDS,
    _code(torch.cuda.set_rng_state): _SEEDS,
    _code(torch.set_default_dtype): "changes torch's default dtype",
    _code(torch.set_default_device): "changes torch's default device",
    _code(torch.use_deterministic_algorithms): "switches determinism on or off",
    _code(torch.save): "writes a file, which a graph would not do",
    _code(torch.load): "reads a file, which a graph would not do",
    _code(contextlib.suppress.__enter__): _HANDLES,
    _code(logging.Logger._log): "logs, which a graph would not do",
    _code(type(os.environ).__setitem__): _ENVIRONMENT,
    _code(type(os.environ).__delitem__): _ENVIRONMENT,
}
_CALLS.pop(None, None)
_NOT_THE_FORWARDS = ("torch", "bnorm_ext")
_BUILTINS: dict[Any, str] = {
    builtins.print: "prints, which a graph would not do",
    builtins.open: "opens a file, which a graph would not do",
    builtins.input: "reads input, which a graph would not do",
    os.urandom: DRAWS,
}
# As above, unless a function of torch calls it: the graph will call that function.
_BUILTINS_OF_OTHERS: dict[Any, str] = {
    warnings.warn: "warns, which a graph would not do",
    os.chdir: "changes the working directory",
    os.putenv: _ENVIRONMENT,
    os.unsetenv: _ENVIRONMENT,
    **dict.fromkeys((os.open, os.remove, os.unlink, os.rename, os.replace), _FILES),
    **dict.fromkeys((os.mkdir, os.rmdir, os.system), _FILES),
    **{
        getattr(time, name): _CLOCK
        for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
        for name in (name, f"{name}_ns")
        if hasattr(time, name)
    },
}
_NOW = ("now", "utcnow", "today")
_SEEDING = ("manual_seed", "seed", "set_state")
_ASKS = "asks whether gradients, autocast, inference mode or determinism are on"
_ASKS_OTHERWISE = "asks for torch's default dtype or device, or for its processes"
# Written in C, or the code of those in Python.
_QUESTIONS: dict[Any, str] = {
    held: what
    for what, functions in {
        _ASKS: (
            torch.is_grad_enabled,
            torch.is_inference_mode_enabled,
            torch.is_autocast_enabled,
            torch.are_deterministic_algorithms_enabled,
        ),
        _ASKS_OTHERWISE: (
            torch.get_default_dtype,
            getattr(torch, "get_default_device", None),
            *(
                getattr(torch.distributed, name, None)
                for name in ("is_initialized", "get_rank", "get_world_size")
            ),
        ),
    }.items()
    for function in functions
    for held in (function, _code(function))
    if held is not None
}
# The code of os.environ, and of what calls it.
_READS_ENVIRONMENT = _code(type(os.environ).__getitem__)
_BETWEEN = ("os", "_collections_abc", "collections.abc")
#: In front of a name that the code has as a text.
AS_TEXT = "'"


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


@contextlib.contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """A context that raises ``observer.fault(text)`` just before the code in it has a side effect.

    The profiler hook ends with the first exception that it raises. One fault is enough: ``fault``
    has noted it, even if the code catches the exception.
    """
    functions = {_code(cls.forward): cls.__name__ for cls in _subclasses(torch.autograd.Function)}
    seen, fault = observer.seen, observer.fault

    def called_python(frame: types.FrameType) -> None:
        code = frame.f_code
        if code in _CALLS:
            raise fault(_CALLS[code])
        if code in _QUESTIONS and not _is_torchs(frame.f_back):
            raise fault(_QUESTIONS[code])
        if code is _READS_ENVIRONMENT and not _is_torchs(_caller_of_environment(frame)):
            raise fault("reads environment variables, which tracing would freeze")
        if code in functions:
            raise fault(f"uses the autograd function {functions[code]}")
        if _is_torchs(frame) or code in seen.ran:
            return
        if isinstance(frame.f_locals.get("self"), torch.nn.Module) and handles_exceptions(code):
            raise fault(_HANDLES)
        standard = _is_standard(frame)
        if not standard and asks_for_types(code):
            raise fault(_EXACT_TYPE)
        scope = frame.f_globals
        variables = (frame.f_locals.get(name) for name in code.co_freevars)
        if any(map(_is_generator, (*map(scope.get, code.co_names), *variables))):
            # It cannot be copied, and whatever is raised in it ends it.
            raise fault("uses a generator that is outside of the module")
        seen.ran[code] = scope
        seen.names.update(code.co_names)
        for constant in () if standard else code.co_consts:
            if isinstance(constant, str) and constant.isidentifier():
                seen.names.add(AS_TEXT + constant)

    def called_builtin(frame: types.FrameType, called: Any) -> None:
        owner = getattr(called, "__self__", None)
        if isinstance(owner, random.Random):
            raise fault(DRAWS)
        if isinstance(owner, torch.Generator) and called.__name__ in _SEEDING:
            raise fault(_SEEDS)
        if isinstance(owner, ContextVar) and not _is_torchs(frame):
            raise fault("uses a context variable")
        if called in _BUILTINS:
            raise fault(_BUILTINS[called])
        if called in _BUILTINS_OF_OTHERS and not _is_torchs(frame):
            raise fault(_BUILTINS_OF_OTHERS[called])
        if called in _QUESTIONS and not _is_torchs(frame):
            raise fault(_QUESTIONS[called])
        if isinstance(owner, type):
            # Since torch 2.14 `apply` is written in C, so that no Python code of it is entered.
            if issubclass(owner, torch.autograd.Function):
                raise fault(f"uses the autograd function {owner.__name__}")
            if issubclass(owner, datetime.date) and called.__name__ in _NOW:
                raise fault(_CLOCK)

    # The collector runs at any time, also in the middle of a forward that has no part in it.
    collecting = {code for callback in gc.callbacks if (code := _code_of(callback)) is not None}
    apart: list[types.FrameType] = []  # the callback that is running, if any

    def watch(frame: types.FrameType, event: str, argument: Any) -> None:
        if apart or (event == "call" and frame.f_code in collecting):
            if not apart:
                apart.append(frame)
            elif event == "return" and frame is apart[0]:
                apart.clear()
            return
        if event == "call":
            called_python(frame)
        elif event == "c_call":
            called_builtin(frame, argument)
        elif event == "return" and not _is_torchs(frame):
            asked = questions(frame.f_code)
            if asked:
                observer.answers(asked, frame.f_locals)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def _code_of(callback: Any) -> types.CodeType | None:
    """Of a function, a method or an object that is callable."""
    code = getattr(callback, "__code__", None) or getattr(type(callback).__call__, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _is_generator(value: Any) -> bool:
    return isinstance(value, types.GeneratorType)


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


def _is_standard(frame: types.FrameType) -> bool:
    return _package(frame) != "__main__" and _package(frame) in sys.stdlib_module_names


def _package(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _caller_of_environment(frame: types.FrameType | None) -> types.FrameType | None:
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame


def _subclasses(cls: type) -> Iterator[Any]:
    subclasses: list[Any] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)
