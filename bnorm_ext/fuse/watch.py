"""Detecting, while a forward runs, side effects that a graph would not repeat.

Python's profiler hook reports every call in the current thread. Nothing in torch is patched, so
other threads may train, trace or draw random numbers meanwhile.
"""

from __future__ import annotations

import builtins
import dis
import functools
import logging
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_GRADIENTS = "switches gradients on or off"
_RANDOM = "draws random numbers that tracing would freeze"


def _code(function: Any) -> types.CodeType | None:
    function = getattr(function, "__wrapped__", function)
    return getattr(function, "__code__", None)


# Code of Python functions of torch -> what a forward does that calls them.
_CALLS: dict[types.CodeType | None, str] = {
    _code(torch.autocast.__enter__): "enters the context autocast",
    _code(saved_tensors_hooks.__enter__): "checkpoints, or hooks the tensors saved for backward",
    _code(torch.no_grad.__enter__): _GRADIENTS,
    _code(torch.enable_grad.__enter__): _GRADIENTS,
    _code(torch.set_grad_enabled.__init__): _GRADIENTS,
    _code(torch.inference_mode.__enter__): _GRADIENTS,
    _code(torch.nn.Module.train): "switches modules between training and evaluation",
    _code(logging.Logger._log): "logs, which a graph would not do",
}
_CALLS.pop(None, None)
_NOT_THE_FORWARDS = ("torch.", "bnorm_ext.")
_BUILTINS: dict[Any, str] = {
    builtins.print: "prints, which a graph would not do",
    builtins.open: "opens a file, which a graph would not do",
    builtins.input: "reads input, which a graph would not do",
    os.urandom: _RANDOM,
}
_ASKS = "asks whether gradients, autocast, inference mode or determinism are on"
# Written in C, or the code of those in Python.
_QUESTIONS: frozenset[Any] = frozenset(
    held
    for question in (
        torch.is_grad_enabled,
        torch.is_inference_mode_enabled,
        torch.is_autocast_enabled,
        torch.are_deterministic_algorithms_enabled,
    )
    for held in (question, _code(question))
    if held is not None
)
#: In front of a name that the code has as a text.
AS_TEXT = "'"
# Functions of torch that draw from its random number generators.
RANDOM_FUNCTIONS = frozenset(
    {
        "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal",
        "normal_", "uniform_", "random_", "bernoulli", "bernoulli_", "exponential_", "geometric_",
        "cauchy_", "log_normal_", "multinomial", "poisson", "binomial", "dropout", "alpha_dropout",
        "feature_dropout", "feature_alpha_dropout", "dropout_", "alpha_dropout_",
    }
)  # fmt: skip


@contextmanager
def watching(fault: Callable[[str], Exception], names: set[str]) -> Iterator[None]:
    """A context that raises ``fault(text)`` just before the code in it has a side effect.

    The profiler hook ends with the first exception that it raises. One fault is enough: ``fault``
    has noted it, even if the code catches the exception.

    Args:
        fault: makes the exception from a text that says what the code does.
        names: takes up all names that code outside of torch and of this package uses; texts that
            could be names, as for ``getattr``, with AS_TEXT in front.
    """
    functions = {_code(cls.forward): cls.__name__ for cls in _subclasses(torch.autograd.Function)}

    def watch(frame: types.FrameType, event: str, called: Any) -> None:
        if event == "call":
            what = _CALLS.get(frame.f_code)
            if what is not None:
                raise fault(what)
            if frame.f_code in _QUESTIONS and not _is_torchs(frame.f_back):
                raise fault(_ASKS)
            if frame.f_code in functions:
                raise fault(f"uses the autograd function {functions[frame.f_code]}")
            if not _is_torchs(frame):
                if isinstance(frame.f_locals.get("self"), torch.nn.Module) and _catches(
                    frame.f_code
                ):
                    raise fault("handles exceptions of what it calls, which a graph would not do")
                names.update(frame.f_code.co_names)
                for constant in frame.f_code.co_consts:
                    if isinstance(constant, str) and constant.isidentifier():
                        names.add(AS_TEXT + constant)
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            if isinstance(owner, random.Random):
                raise fault(_RANDOM)
            if called in _BUILTINS:
                raise fault(_BUILTINS[called])
            if called in _QUESTIONS and not _is_torchs(frame):
                raise fault(_ASKS)
            # Since torch 2.14 `apply` is written in C, so that no Python code of it is entered.
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                raise fault(f"uses the autograd function {owner.__name__}")

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


@functools.cache
def _catches(code: types.CodeType) -> bool:
    """Whether the code has an ``except`` for certain exceptions."""
    operations = {instruction.opname for instruction in dis.get_instructions(code)}
    return not operations.isdisjoint({"CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH"})


def _is_torchs(frame: types.FrameType | None) -> bool:
    """Whether the code is torch's or this package's, rather than a forward's."""
    return frame is None or frame.f_globals.get("__name__", "").startswith(_NOT_THE_FORWARDS)


def _subclasses(cls: type) -> Iterator[Any]:
    subclasses: list[Any] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)


class NumpyRandom:
    """numpy's global random number generator; the profiler hook does not report its functions."""

    def __init__(self) -> None:
        self.random = getattr(sys.modules.get("numpy"), "random", None)
        self.functions = {name for name in dir(self.random) if not name.startswith("_")}
        self.before: Any = None if self.random is None else self.random.get_state()

    def was_used(self, names: set[str]) -> str | None:
        """What the code that uses these names did, as text; None if it drew no numbers.

        If it did, the state of the generator is restored. If the code names no function of
        numpy.random, another thread has drawn, and its numbers stay drawn. If it names one and
        another thread drew at the same time, both draw the same numbers again.
        """
        if self.random is None or names.isdisjoint(self.functions):
            return None
        now = self.random.get_state()
        if (now[1].tobytes(), *now[2:]) == (self.before[1].tobytes(), *self.before[2:]):
            return None
        self.random.set_state(self.before)
        return _RANDOM
