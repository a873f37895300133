"""Compiles programs that run kernels in the emulator.

Objects are kept in build/emulator/ under a hash of all that went into them, so a second run of the
tests compiles nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
INCLUDE = HERE / "include"
CACHE = ROOT / "build" / "emulator"
RUNTIME = sorted([*(HERE / "src").glob("*.cpp"), *(HERE / "ptx").glob("*.cpp")])
# g++ before 13 heeds no pragma of a header's about pragmas; kernels unroll loops by one.
# It also warns of values that kernels pass on where they have not loaded them, and never read then.
FLAGS = ["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-maybe-uninitialized"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1"]
HEADERS = {".h", ".cuh", ".inc"}
JOBS = 2


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def run_compiler(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [compiler() or "g++", *arguments], capture_output=True, text=True, check=False
    )


def digest(parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:20]


def made(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`, by `make(temporary)` if it is not there yet: whole or not at all, and by one
    process or thread only. Others wait, and find it then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return target
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_name(f"{target.name}.part")
            try:
                make(temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


@functools.cache
def compiler_version() -> bytes:
    return run_compiler(["--version"]).stdout.encode()


@functools.cache
def header_bytes(folder: Path) -> bytes:
    headers = sorted(p for p in folder.rglob("*") if p.suffix in HEADERS)
    return b"".join(bytes(p) + b"\0" + p.read_bytes() for p in headers)


@functools.cache
def has_boost_context() -> bool:
    """Whether programs can be linked against Boost.Context."""

    def ask(answer: Path) -> None:
        source = CACHE / "boost.cpp"
        source.write_text(
            "#include <boost/context/detail/fcontext.hpp>\n"
            "int main() { return boost::context::detail::make_fcontext(0, 0, 0) == 0; }\n"
        )
        linked = run_compiler([str(source), "-lboost_context", "-o", str(CACHE / "boost.out")])
        answer.write_text("no" if linked.returncode else "yes")

    return made(CACHE / f"boost-{digest([compiler_version()])}", ask).read_text() == "yes"


def compile_object(source: Path, flags: Sequence[str], includes: Sequence[Path]) -> Path:
    """The object of `source`; its name is a hash of everything in it but system headers."""
    where = [argument for folder in [INCLUDE, *includes] for argument in ("-I", str(folder))]
    language = ["-x", "c++"]
    parts = [" ".join(flags).encode(), compiler_version()]
    if source.suffix == ".cu":
        # Kernels are hashed preprocessed, so that a change of a header, or a changed copy of the
        # folder, compiles only those that see it.
        seen = run_compiler([*flags, *where, *language, "-E", "-P", str(source)])
        parts += [seen.stdout.encode(), seen.stderr.encode()]
    else:
        parts += [bytes(source), source.read_bytes(), *map(header_bytes, [HERE, *includes])]

    def compile_to(temporary: Path) -> None:
        done = run_compiler([*flags, *where, *language, "-c", str(source), "-o", str(temporary)])
        if done.returncode != 0 or done.stderr:
            problem = "does not compile without errors and warnings"
            raise RuntimeError(f"{source} {problem}:\n{done.stderr}")

    return made(CACHE / f"{source.stem}-{digest(parts)}.o", compile_to)


def build(
    name: str,
    sources: Sequence[Path | tuple[Path, Sequence[Path]]],
    *,
    includes: Sequence[Path] = (),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    fibers: str | None = None,
    sanitize: bool = False,
    shared: bool = False,
) -> Path:
    """The program of `sources` (.cu and .cpp) and the emulator, or the shared library of them.

    A source may come with its own folders of headers, as (source, folders). `fibers` is "boost" or
    "ucontext"; by default the former where it is installed.
    """
    if fibers is None:
        fibers = "boost" if has_boost_context() else "ucontext"
    common = [*FLAGS, *(SANITIZE if sanitize else []), "-DBNORM_EXT_EMULATOR"]
    common += ["-fPIC", "-fvisibility=hidden"] if shared else []
    jobs: list[tuple[Path, list[str], Sequence[Path]]] = []
    for source in sources:  # before the runtime, since they take longer
        file, folders = source if isinstance(source, tuple) else (source, includes)
        jobs.append((file, [*common, *flags], folders))
    for source in RUNTIME:
        boost = fibers == "boost" and source.name == "fiber.cpp"
        extra = ["-DEMULATOR_FIBERS_BOOST"] if boost else []
        # What PTX rounds twice must not become one fused operation here.
        extra += ["-ffp-contract=off"] if source.parent.name == "ptx" else []
        jobs.append((source, [*common, *extra], [HERE / "src"]))
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    if fibers == "boost":
        libraries = [*libraries, "-lboost_context"]
    linked = digest([*(bytes(o) for o in objects), *(library.encode() for library in libraries)])

    def link_to(temporary: Path) -> None:
        paths = [str(o) for o in objects]
        kind = ["-shared"] if shared else []
        link = [*common, *kind, *paths, "-o", str(temporary), "-ldl", *libraries]
        done = run_compiler(link)
        if done.returncode != 0:
            raise RuntimeError(f"{name} cannot be linked:\n{done.stderr}")

    return made(CACHE / f"{name}-{linked}", link_to)


def selftest(fibers: str | None = None, sanitize: bool = False) -> Path:
    """The emulator's self-test: kernels with and without mistakes."""
    folder = HERE / "selftest"
    sources = sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])
    return build("selftest", sources, fibers=fibers, sanitize=sanitize)
