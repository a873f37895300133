"""A compiled module that is damaged, incomplete or of something else: one ImportError that says
which file, what is wrong with it and what to run. Never a crash, never a message of the linker's
alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bnorm_ext
from bnorm_ext import _load
from bnorm_ext._library import flaw, mapped_bytes

pytestmark = pytest.mark.skipif(_load.DISABLED, reason="BNORM_EXT_DISABLE=1: nothing is loaded")

PACKAGE = Path(bnorm_ext.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULE = PACKAGE / f"_C{SUFFIX}"


def cut(share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / MODULE.name
        os.truncate(path, int(path.stat().st_size * share))

    return change


def cut_by_a_byte(folder: Path) -> None:
    """Of what is mapped: section headers and symbols behind it are not needed."""
    path = folder / MODULE.name
    os.truncate(path, mapped_bytes(path) - 1)


def record(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "_build.py").write_text(text)


def of_other_python(folder: Path) -> None:
    (folder / MODULE.name).rename(folder / "_C.cpython-39-x86_64-linux-gnu.so")


def compiled(source: str) -> Callable[[Path], Any]:
    """In place of the module, a library of this C source."""

    def change(folder: Path) -> None:
        subprocess.run(
            [*(os.environ.get("CC", "cc").split()), "-shared", "-fPIC", "-x", "c", "-", "-o",
             str(folder / MODULE.name)],
            input=source, text=True, check=True,
        )  # fmt: skip

    return change


def of_other_machine(folder: Path) -> None:
    path = folder / MODULE.name
    data = bytearray(path.read_bytes())
    other = 183 if struct.unpack_from("<H", data, 18)[0] == 62 else 62  # aarch64, x86-64
    struct.pack_into("<H", data, 18, other)
    path.write_bytes(data)


NEEDS_MORE = "void missing(void); void *PyInit__C(void) { missing(); return 0; }"
OTHER = f"torch {torch.__version__}"
# What is done to the copy, and what the message has to say. {module}: the file's path.
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / MODULE.name).unlink(), "_C is missing from"),
    "empty": (cut(0), "cannot load {module}: the file is empty"),
    "ten bytes": (
        lambda folder: os.truncate(folder / MODULE.name, 10),
        "cut off after 10 of 64 bytes",
    ),
    "half": (cut(0.5), "cannot load {module}: the file is cut off after"),
    "one byte": (cut_by_a_byte, "cannot load {module}: the file is cut off after"),
    "no library": (lambda f: (f / MODULE.name).write_text("Git LFS"), "cannot load {module}: "),
    "another Python's": (of_other_python, "_C.cpython-39-x86_64-linux-gnu.so of another Python"),
    "another library": (compiled("int nothing;"), "cannot load {module}: dynamic module does not"),
    "another build of torch": (compiled(NEEDS_MORE), "undefined symbol: missing"),
    "another machine's": (of_other_machine, "cannot load {module}: "),
    "no record": (lambda folder: (folder / "_build.py").unlink(), "_build.py is missing from"),
    "empty record": (record(""), "_build.py: it names no version of torch"),
    "damaged record": (record("TORCH = '2."), "_build.py: unterminated string literal"),
    "another torch": (record("TORCH = '1.0'"), f"compiled against torch 1.0, but {OTHER}"),
}

# Loads each copy in turn, under its own name, in one process: importing torch takes seconds. Its
# last line says how far it came.
PROGRAM = """
import importlib, json, sys
import torch
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name + "._load").load()
        found = ["nothing", ""]
    except BaseException as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([name, found]), flush=True)
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("copies")
    names = {}
    for number, (name, (change, _)) in enumerate(CASES.items()):
        copy = folder / f"copy{number}"
        copy.mkdir()
        (copy / "__init__.py").touch()
        for file in ("_load.py", "_library.py", "_version.py", "_build.py", MODULE.name):
            shutil.copy(PACKAGE / file, copy)
        change(copy)
        names[copy.name] = name
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(names))],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "BNORM_EXT_DISABLE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {}
    for line in done.stdout.splitlines():
        name, result = json.loads(line)
        found[names[name]] = [*result, str(folder / name / MODULE.name)]
    assert done.returncode == 0, f"killed after {list(found)}: {done.stderr[-500:]}"
    return found


@pytest.mark.parametrize("name", CASES)
def test_message(messages, name):
    kind, text, module = messages[name]
    assert kind == "ImportError"
    assert CASES[name][1].format(module=module) in text
    assert text.startswith("bnorm_ext ")
    assert "pip install --no-build-isolation" in text
    assert text.count("\n\n    pip install") == 1


def test_what_is_compiled_is_complete():
    assert flaw(MODULE) == ""
