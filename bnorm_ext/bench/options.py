"""Command line options that the programs share. Errors are one line, and come before anything is
measured."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

#: What the command line's first argument may name, besides the microbenchmarks. Each is also a
#: module of its own: `bnorm-bench train` is `python -m bench.train`.
PROGRAMS = ("train", "profile", "sync", "cost_model", "compare", "plots", "numerics")
DAY = 86400.0
LARGEST = 2**63 - 1  # the largest size that torch takes


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A converter for argparse: a whole number within bounds."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)} is no whole number") from None
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"{bound}, not {_short(text)}")
        return value

    return number


def positive(high: float) -> Callable[[str], float]:
    """A converter for argparse: a number above 0."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)} is no number") from None
        if not 0 < value <= high:  # nan neither
            raise argparse.ArgumentTypeError(
                f"must be positive and at most {high:g}, not {_short(text)}"
            )
        return value

    return number


def threads(text: str) -> int:
    """A converter for argparse: a number of threads up to that of the cores. More would measure the
    scheduler, and very many end the process."""
    return whole(1, os.cpu_count() or 1)(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def first_line(error: BaseException) -> str:
    """Type and text of an error as one line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def listed(values: Sequence[str] | None, option: str) -> list[str]:
    """The values of an option, separated by spaces, commas or both; empty if it is not given."""
    found = [part for value in values or () for part in value.split(",") if part]
    if values is not None and not found:
        raise ValueError(f"{option}: names nothing")
    return found


def names(
    values: Sequence[str] | None,
    option: str,
    known: Sequence[str],
    aliases: Mapping[str, str] | None = None,
) -> list[str]:
    """The names in the values of an option, each once. Raises ValueError for an unknown one."""
    found = [(aliases or {}).get(name, name) for name in listed(values, option)]
    for name in found:
        if name not in known:
            raise ValueError(f"{option}: unknown {_short(name)}; there are {', '.join(known)}")
    return list(dict.fromkeys(found))


def shape_of(text: str) -> tuple[int, ...]:
    """The shape in a text: 32,64,56,56 or, as in the tables, 32x64x56x56."""
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"--shape {_short(text)}: must be numbers such as 32,64,56,56") from None
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"--shape {_short(text)}: more elements than a tensor can have")
    return sizes


def device_of(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        )
        raise ValueError(f"--device cuda: there is no CUDA device ({why})")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


# --- files ----------------------------------------------------------------------------------------


def import_pictures() -> ModuleType:
    """The module `pictures`. Raises ValueError if matplotlib, which it needs, is not installed."""
    try:
        return importlib.import_module(".pictures", __package__)
    except ImportError as error:
        raise ValueError(f"pictures: {error}; pip install matplotlib") from None


def part_of(path: Path) -> Path:
    """The temporary file that is written first and then renamed to `path`."""
    return path.with_name(path.name + ".part")


def check_output(path: Path | None, option: str) -> None:
    """Raises ValueError if no file can be written under this name."""
    if path is None:
        return
    try:
        problem = _problem(Path(os.path.realpath(path)) if path.name else path)
    except OSError as error:  # no permission, a read-only file system, a name that is too long
        problem = f"{error.strerror or error}"
    except ValueError as error:  # a name with a NUL in it
        problem = str(error)
    if problem:
        raise ValueError(f"{option} {path}: {problem}")


def _problem(path: Path) -> str | None:
    if not path.name or path.is_dir():
        return "is a folder, not a file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if path.exists():
        mode = path.stat().st_mode
        # os.access allows everything to root, but a file without write permission is respected.
        if not mode & 0o222 or not os.access(path, os.W_OK):
            return "is read-only"
        if not stat.S_ISREG(mode):
            return None  # a device or a pipe, which must not be opened for a trial
    probe = part_of(path)
    probe.touch()
    probe.unlink()
    return None


def write(path: Path, content: bytes) -> None:
    """Writes a file completely or, if interrupted, not at all."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = part_of(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
