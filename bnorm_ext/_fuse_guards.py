"""What Python code does beside computing, found while it runs: a graph would not do it."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks


class Unfit(Exception):
    """``module`` cannot be traced, for the reason given."""

    def __init__(self, reason: str, module: nn.Module | None = None) -> None:
        super().__init__(reason)
        self.module = module


@contextmanager
def unchanged(root: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode of every module, and restores all that running Python forwards may change.

    Raises Unfit if attributes of a module were changed, or a list or dictionary in them.
    """
    modes = {module: module.training for module in root.modules()}
    randomness = random_states()
    for module in modes:
        module.training = training
    before = [(module, held, copy.copy(held)) for module in modes for held in _held(module)]
    changed = None
    try:
        yield
    finally:
        for module, held, then in before:
            if len(held) != len(then) or any(
                a is not b for a, b in zip(_items(held), _items(then), strict=True)
            ):
                _restore(held, then)
                changed = module
        for module, mode in modes.items():
            module.training = mode
        for (_, restore), (state, _) in zip(random_states(), randomness, strict=False):
            restore(state)
    if changed is not None:
        raise Unfit("its forward changes attributes of the module", changed)


def _held(module: nn.Module) -> list[Any]:
    attributes = vars(module)
    inside = [v for v in attributes.values() if type(v) in (dict, list, OrderedDict)]
    return [attributes, *inside]


def _items(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [*held.keys(), *held.values()]


def _restore(held: Any, then: Any) -> None:
    if isinstance(held, list):
        held[:] = then
    else:
        held.clear()
        held.update(then)


def random_states() -> list[tuple[Any, Callable[[Any], None]]]:
    """The state of each generator that Python code draws from, and what restores it."""
    states = [(torch.get_rng_state(), torch.set_rng_state), (random.getstate(), random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states.append(((name, tuple(keys), *rest), numpy.random.set_state))
    return states


def autograd_modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@contextmanager
def contexts_refused() -> Iterator[None]:
    """Makes what a graph would silently leave out an error: contexts that a forward enters for
    autocast or checkpointing, and functions with a backward of their own."""

    def enter(self: Any) -> None:
        raise Unfit(f"its forward enters the context {type(self).__name__}")

    apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def checked_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            raise Unfit(f"its forward uses the autograd function {cls.__name__}")
        return apply(cls, *args, **kwargs)

    with (
        _replaced(torch.autocast, "__enter__", enter),
        _replaced(saved_tensors_hooks, "__enter__", enter),
        _replaced(torch.autograd.Function, "apply", classmethod(checked_apply)),
    ):
        yield


@contextmanager
def _replaced(cls: type, name: str, value: Any) -> Iterator[None]:
    before = vars(cls)[name]
    setattr(cls, name, value)
    try:
        yield
    finally:
        setattr(cls, name, before)
