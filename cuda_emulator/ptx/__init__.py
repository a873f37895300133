"""The PTX engine from Python: what it knows, what is in a file, and running a small program."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from cuda_emulator import building

HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """What the interpreter has printed: reports, or an instruction that it does not know."""


def tool() -> Path:
    """The program that links the interpreter (tool/main.cpp)."""
    return building.build("ptx", [HERE / "tool" / "main.cpp"])


def _run(*arguments: object) -> str:
    done = subprocess.run(
        [str(tool()), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Failed(done.stdout + done.stderr)
    return done.stdout


def known_kinds() -> list[str]:
    """The kinds of instructions that the interpreter executes: "add.s32", "mov.u32 %tid.x"."""
    return _run("kinds").splitlines()


def listed(file: Path) -> list[tuple[str, int, str]]:
    """(kernel's mangled name, line, kind) of each instruction of a .ptx file. Fails, with file and
    line, where a kind is not known."""
    lines = (line.split(" ", 2) for line in _run("list", file).splitlines())
    return [(kernel, int(line), kind) for kernel, line, kind in lines]


def run_program(
    text: str,
    given: bytes,
    result_bytes: int,
    *,
    device: str = "sm_90",
    blocks: int = 1,
    threads: int = 1,
    shared_bytes: int = 0,
    cluster: int = 0,
    seed: int = 0,
) -> bytes:
    """What the kernel `program(in, out)` of a PTX text leaves in `out`, of zeros before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.ptx").write_text(text)
        (folder / "in").write_bytes(given)
        shape = (blocks, threads, shared_bytes, cluster, seed)
        _run("run", folder, device, *shape, folder / "in", folder / "out", result_bytes)
        return (folder / "out").read_bytes()
