"""`python -m bench` in the checkout: the programs in bnorm_ext/bench, under a short name.

Python looks into the current folder first, so that `import bnorm_ext` finds the source folder here,
compiled or not. Where that one cannot be imported, an installed bnorm_ext is measured instead.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
# Submodules are looked for there: `bench.train` is bnorm_ext/bench/train.py.
__path__ = [str(_ROOT / "bnorm_ext" / "bench")]


def _import_bnorm_ext() -> None:
    """The checkout's where it is compiled for this Python and torch, else an installed one."""
    try:
        importlib.import_module("bnorm_ext")
        return
    except ImportError as error:
        failure = error
    for name in [n for n in sys.modules if n.partition(".")[0] == "bnorm_ext"]:
        del sys.modules[name]  # else what was imported half would be taken for the installed one
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != _ROOT]
    try:
        importlib.import_module("bnorm_ext")
    except ImportError as error:
        # That none is installed is no news; the checkout's error says what to do about it.
        raise (failure if error.name == "bnorm_ext" else error) from None
    finally:
        sys.path[:] = path


_import_bnorm_ext()
