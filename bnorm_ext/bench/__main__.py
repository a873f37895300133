"""The command line: the first argument names a program (train, profile, ...); without one the
microbenchmarks run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .options import PROGRAMS


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Runs the program and returns its exit code.

    `command` is how this was started, for messages and for the header of results.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command or f"python -m {__package__}"
    program = "micro"
    if arguments and arguments[0].replace("-", "_") in PROGRAMS:
        command += f" {arguments[0]}"
        program = arguments.pop(0).replace("-", "_")
    module = importlib.import_module(f".{program}", __package__)
    code: int = module.main(arguments, command)
    return code


def script() -> int:
    """The entry point of the command `bnorm-bench`."""
    return main(command="bnorm-bench")


if __name__ == "__main__":
    sys.exit(main())
