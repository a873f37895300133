"""State of the process that a forward may change: the random number generators that all code
shares, the working directory, the environment variables.

What changes them is caught beforehand (``watch.py``) where Python's profiler hook reports it. It
does not report numpy's functions, and nothing at all after it has raised once, which a forward may
ignore (``except BaseException``).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: What a forward does that draws random numbers.
DRAWS = "draws random numbers that tracing would freeze"
#: Functions of torch that draw from its random number generators.
RANDOM_FUNCTIONS = frozenset(
    {
        "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal",
        "normal_", "uniform_", "random_", "bernoulli", "bernoulli_", "exponential_", "geometric_",
        "cauchy_", "log_normal_", "multinomial", "poisson", "binomial", "dropout", "alpha_dropout",
        "feature_dropout", "feature_alpha_dropout", "dropout_", "alpha_dropout_",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    what: str  #: what a forward does that changes this part
    read: Callable[[], Any]  #: as a value that can be compared
    write: Callable[[Any], None]
    #: Names of which code that changes it uses one; none if the hook reports the change.
    names: frozenset[str] = frozenset()


def _write_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _change_directory(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


def _parts() -> list[_Part]:
    parts = [
        _Part(
            DRAWS,
            lambda: bytes(torch.get_rng_state().tolist()),
            lambda state: torch.set_rng_state(torch.tensor(list(state), dtype=torch.uint8)),
        ),
        _Part(DRAWS, random.getstate, random.setstate),
        _Part("changes the working directory", _working_directory, _change_directory),
        _Part("changes environment variables", lambda: dict(os.environ), _write_environment),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:

        def read() -> tuple[Any, ...]:
            kind, keys, *rest = numpy.random.get_state()
            return (kind, keys.tobytes(), *rest)

        def write(state: tuple[Any, ...]) -> None:
            kind, keys, *rest = state
            numpy.random.set_state((kind, numpy.frombuffer(keys, numpy.uint32), *rest))

        names = frozenset(name for name in dir(numpy.random) if not name.startswith("_"))
        parts.append(_Part(DRAWS, read, write, names))
    return parts


class ProcessState:
    """What the process was like."""

    def __init__(self) -> None:
        self._parts = [(part, part.read()) for part in _parts()]

    def restore(self, names: set[str], watched: bool) -> str | None:
        """Restores what code that uses these names has changed.

        What such code cannot have changed was changed by another thread, and stays. If it can have,
        and another thread changed the same at that time, the other's change is undone too.

        Args:
            names: of the code that ran.
            watched: whether the profiler hook was there all the time.

        Returns:
            What the code did, as text; None if it changed nothing.
        """
        did = None
        for part, before in self._parts:
            if (not watched or not names.isdisjoint(part.names)) and part.read() != before:
                part.write(before)
                did = did or part.what
        return did
