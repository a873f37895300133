"""How C++ files of the tests that include torch's headers are compiled and linked."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(torch.__file__).parent


def _want_cpp20() -> bool:
    return "C++20" in (ROOT / "include" / "ATen" / "ATen.h").read_text()


def flags() -> list[str]:
    """To stand behind all others: later words win, and the headers want C++20 from some version
    of torch on."""
    found = []
    for path in ("include", "include/torch/csrc/api/include"):
        found += ["-isystem", str(ROOT / path)]
    return [*found, *(["-std=c++20"] if _want_cpp20() else [])]


def libraries(*names: str) -> list[str]:
    return [f"-L{ROOT / 'lib'}", *(f"-l{name}" for name in names)]
