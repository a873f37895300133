"""The program that the first argument names: train, profile, ...; without a name the
microbenchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

#: Each is also a module of its own: `bnorm-bench train` is `python -m bench.train`.
PROGRAMS = ("train", "profile", "sync", "cost_model", "compare", "plots")


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """`command`: how this was started, for messages and for the head of what is written."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}"
    program = "micro"
    if arguments and arguments[0].replace("-", "_") in PROGRAMS:
        command += f" {arguments[0]}"
        program = arguments.pop(0).replace("-", "_")
    module = importlib.import_module(f".{program}", __package__)
    return module.main(arguments, command)


def script() -> int:
    """What the command `bnorm-bench` calls."""
    return main(command="bnorm-bench")


if __name__ == "__main__":
    sys.exit(main())
