"""The CUDA operators on CPU tensors: csrc/cuda/ compiled against cuda_emulator/.

`run(case)` is what `cases.run` is for the installed operators. Every tensor of a run lives in
guarded memory of the emulator, outputs poisoned; whatever the emulator reports raises `Reported`.
The library is compiled on first use into build/emulator/ and kept until a source changes.

Environment variables choose what all tests of a process run on:

BNORM_EXT_EMULATED_DEVICE         the device of tests that do not name one; sm_80
BNORM_EXT_EMULATED_PTX            a folder of .ptx files to run in place of the kernels' source
BNORM_EXT_EMULATED_PTX_COVERAGE   a prefix: at its end, each process writes what it executed
BNORM_EXT_EMULATED_EXP2_ERROR     added to results of ex2.approx, in units of the last place
BNORM_EXT_EMULATED_LIBRARY        another library than that of csrc/cuda/
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_emulator import building
from tests.common import torch_headers
from tests.common.cases import Case, Results, accumulation_type

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TORCH_SHIM = building.HERE / "torch_shim"
FLAGS = ["-ffp-contract=off", "-Werror"]
SHIM = TORCH_SHIM / "include"  # in place of headers of CUDA and of torch's CUDA part
# The operators' bodies, which know nothing of CUDA.
BODIES = [
    f"{name}.cpp"
    for name in ("forward", "backward", "backend", "checks", "epilogue", "memory", "tensors")
]
# What torch_shim/runner_operators.cpp registers the operators under.
KEY = torch._C.DispatchKey.PrivateUse1


class Reported(AssertionError):
    """The emulator has found an error in a kernel or a launch."""


def _same_top_level(one: Path, other: Path) -> bool:
    """Whether all that BODIES are compiled from is equal, so that they need not be compiled again
    for mutants of csrc/cuda/."""
    files = [p for p in one.iterdir() if p.suffix in (".cpp", ".h")]
    return all((other / p.name).read_bytes() == p.read_bytes() for p in files)


def build(
    csrc: Path = CSRC,
    *,
    hosts: Path | None = None,
    flags: Sequence[str] = FLAGS,
    sanitize: bool = False,
) -> Path:
    """The library with the operators of csrc/cuda/, compiled where something has changed.

    hosts: where the torch-facing files are taken from, if elsewhere.
    """
    hosts = hosts or csrc
    bodies = CSRC if _same_top_level(hosts, CSRC) else hosts
    return building.build(
        "libbnorm_ext_emulated.so",
        [
            *((bodies / file, [SHIM, bodies]) for file in BODIES),
            *((file, [SHIM, hosts]) for file in sorted(hosts.glob("cuda/*.cpp"))),
            (TORCH_SHIM / "runner_operators.cpp", [SHIM, bodies]),
            (TORCH_SHIM / "runner.cpp", [SHIM]),
            *((kernel, [SHIM, csrc]) for kernel in sorted(csrc.glob("cuda/*.cu"))),
        ],
        flags=[*flags, *torch_headers.flags()],
        libraries=torch_headers.libraries("torch", "torch_cpu", "c10"),
        sanitize=sanitize,
        shared=True,
    )


@functools.cache
def built() -> Path | Exception:
    """The library, or what compiling it once has failed with."""
    try:
        return build()
    except RuntimeError as error:
        return error


@functools.cache
def library() -> Any:
    """The runner's C interface, with the operators registered."""
    path = os.environ.get("BNORM_EXT_EMULATED_LIBRARY") or built()
    if isinstance(path, Exception):
        raise path
    import bnorm_ext  # noqa: F401  the schemas

    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.runner_begin.restype = ctypes.c_bool
    loaded.runner_begin.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_bool,
    ]
    for function in (
        loaded.runner_reports,
        loaded.runner_launches,
        loaded.runner_profiles,
        loaded.runner_ptx,
    ):
        function.restype = ctypes.c_char_p
    use_ptx(loaded)
    return loaded


def use_ptx(loaded: Any) -> None:
    """Has kernels run as PTX, where the environment says so."""
    folder = os.environ.get("BNORM_EXT_EMULATED_PTX")
    if not folder:
        return
    wrong = loaded.runner_ptx(folder.encode()).decode()
    if wrong:
        raise RuntimeError(wrong)
    loaded.runner_approximation_error(int(os.environ.get("BNORM_EXT_EMULATED_EXP2_ERROR", "0")))
    if prefix := os.environ.get("BNORM_EXT_EMULATED_PTX_COVERAGE"):
        atexit.register(loaded.runner_ptx_coverage, f"{prefix}.{os.getpid()}".encode())


@dataclasses.dataclass(frozen=True)
class Profile:
    """How a launch has used memory (emulator::Profile in harness.h)."""

    kernel: str
    stores: int
    evict_first: int  #: of them
    ways: dict[int, int]  #: by the bytes of an access to shared memory: its worst bank conflict


def _profile(line: str) -> Profile:
    kernel, stores, evict_first, *ways = line.rsplit(" ", 7)
    found = {1 << i: int(n) for i, n in enumerate(ways) if n != "0"}
    return Profile(kernel, int(stores), int(evict_first), found)


class Session:
    """One device, one seed; see `session`."""

    def __init__(self) -> None:
        # Each "kernel blocks threads shared_bytes blocks_of_a_cluster".
        self.launches: list[str] = []
        self._library = library()

    def copy(self, t: Tensor | None, *, inout: bool = False) -> Tensor | None:
        """`t` in guarded memory, with its strides and its distance from 16 bytes."""
        if t is None:
            return None
        self._library.runner_role(b"inout" if inout else b"input")
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        skip = t.data_ptr() % 16 // t.element_size()
        base = torch.empty(skip + (last + 1 if t.numel() else 0), dtype=t.dtype)
        copied = base.as_strided(t.shape, t.stride(), skip)
        copied.copy_(t.detach())
        self._library.runner_role(b"inout")
        return copied

    def refuse(self) -> None:
        """The device refuses the next launch with clusters, and the next cooperative one."""
        self._library.runner_refuse()

    def refuse_launch(self, others: int, error: int) -> None:
        """The launch after `others` more ones returns this number of CUDA's errors."""
        self._library.runner_refuse_launch(others, error)

    def refuse_allocation(self, others: int) -> None:
        """Torch's allocation after `others` more ones fails."""
        self._library.runner_refuse_allocation(others)

    def profile(self, l2_bytes: int = 0) -> None:
        """From now on `profiles` has an entry for each launch. l2_bytes: of the L2, if not 0."""
        self._library.runner_profile(l2_bytes)

    def profiles(self) -> list[Profile]:
        return [_profile(line) for line in self._library.runner_profiles().decode().splitlines()]

    def call(self, name: str, *arguments: Any, outputs: Sequence[Tensor | int] = ()) -> Any:
        """The operator; what it allocates of the sizes of `outputs` has to be written once."""
        sizes = [t.nbytes if isinstance(t, Tensor) else t for t in outputs]
        self._library.runner_outputs((ctypes.c_int64 * len(sizes))(*sizes), len(sizes))
        try:
            return getattr(torch.ops.bnorm_ext, name).default._op_dk(KEY, *arguments)
        finally:
            self._library.runner_outputs((ctypes.c_int64 * 0)(), 0)


@contextlib.contextmanager
def path_wanted(path: str | None) -> Iterator[None]:
    """Kernels take this path where they can (csrc/cuda/plan.h); None: the best one."""
    name = "BNORM_EXT_CUDA_PATH"
    before = os.environ.pop(name, None)
    if path is not None:
        os.environ[name] = path
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def session(
    *,
    seed: int = 0,
    device: str = os.environ.get("BNORM_EXT_EMULATED_DEVICE", "sm_80"),
    multiprocessors: int = 2,
    capturing: bool = False,
    path: str | None = "two_pass",
) -> Iterator[Session]:
    """Everything that torch allocates inside is guarded memory and is gone with the next session:
    clone what is kept. Raises `Reported` at the end, naming the seed."""
    with path_wanted(path), _session(seed, device, multiprocessors, capturing) as current:
        yield current


@contextlib.contextmanager
def _session(seed: int, device: str, multiprocessors: int, capturing: bool) -> Iterator[Session]:
    current = Session()
    lib = current._library
    assert lib.runner_begin(device.encode(), multiprocessors, seed, capturing), device
    failed: Exception | None = None
    try:
        yield current
    except RuntimeError as error:  # a launch that was refused or that found an error
        failed = error
    finally:
        lib.runner_end()
        current.launches = lib.runner_launches().decode().splitlines()
    text = lib.runner_reports().decode()
    if text:
        raise Reported(f"seed {seed}, {device}: {text}") from failed
    if failed is not None:
        raise failed


@dataclasses.dataclass
class Epilogue:
    """What follows the normalisation: act(normalised + residual)."""

    act: str = "identity"
    slope: float = 0.01  # of leaky_relu
    residual: Tensor | None = None
    # Whether backward reads the mask that forward has left, where it leaves one, or the residual.
    masked: bool = True

    def leaves_mask(self) -> bool:
        return self.residual is not None and self.act in ("relu", "relu6", "leaky_relu")


def group_of(x: Tensor) -> int:
    """How many channels of x the kernels take together, or 0 (csrc/cuda/plan.h)."""
    channels, positions = x.shape[1], x.numel() // (x.shape[0] * x.shape[1])
    width = 16 // x.element_size()
    if not is_channels_first(x) or channels == 1 or x.element_size() > 4:
        return 0
    if positions < width or positions % width == 0:
        return 0
    group = width // math.gcd(width, positions)
    while 2 * group <= 16 and group * positions < 16 * width and channels % (2 * group) == 0:
        group *= 2
    return group if channels % group == 0 else 0


def is_channels_first(x: Tensor) -> bool:
    positions = x.numel() // x.shape[1]
    return x.shape[1] == 1 or (x.is_contiguous() and positions > x.shape[0])


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Of the mask for x: rows, and bytes in each (csrc/cuda/mask.h)."""
    if group_of(x):
        return x.numel() * x.element_size() // 16, 1
    positions = x.numel() // x.shape[1]
    rows, bits = (x.shape[1], positions) if is_channels_first(x) else (positions, x.shape[1])
    return rows, -(-bits // 8)


def run(
    c: Case,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  never changed
    *,
    launches: Callable[[str], None] = lambda line: None,
    profiles: Callable[[Profile], None] | None = None,
    l2_bytes: int = 0,
    **where: Any,
) -> Results:
    """Forward and backward of one case in the emulator; everything that came out, by name.

    launches: called with a line for each launch. profiles: called with how each launch has used
    memory, on a device with an L2 of l2_bytes, or its own.
    """
    e = epilogue
    is_plain = e.act == "identity" and e.residual is None
    with session(**where) as s:
        if profiles is not None:
            s.profile(l2_bytes)
        x, dy, weight, bias = (s.copy(t) for t in (c.x, c.dy, c.weight, c.bias))
        residual = s.copy(e.residual)
        running = [s.copy(t, inout=True) for t in (c.running_mean, c.running_var)]
        channels = c.x.shape[1]
        copied = group_of(c.x) > 0 and any(
            t is not None and t.data_ptr() % 16 for t in (c.x, c.dy, e.residual)
        )
        # Copies of x's size are torch's, and written by it.
        sizes: list[Any] = [] if copied else [c.x]
        of_channels = channels * torch.empty((), dtype=accumulation_type(c.x.dtype)).nbytes
        sizes += [2 * of_channels, of_channels]  # mean and rstd
        sizes += [t for t in (c.weight, c.bias) if t is not None]
        save_mask = e.masked and e.leaves_mask()
        if save_mask:
            sizes.append(math.prod(mask_shape(c.x)))
        output_mask = [True, not is_plain, weight is not None, bias is not None]
        act = (e.act, e.slope)
        if c.training:
            y, mean, rstd, mask = s.call(
                *("batch_norm_training", x, residual, weight, bias, *running, None, c.momentum),
                *(c.eps, *act, e.masked),
                outputs=sizes,
            )
            statistics = (None, None, mean, rstd)
        else:
            y, mask = s.call(
                *("batch_norm_inference", x, residual, weight, bias, *running, c.eps, *act),
                e.masked,
                outputs=sizes,
            )
            statistics = (*running, None, None)
        assert (mask.numel() > 0) == save_mask
        dx, dresidual, dweight, dbias = s.call(
            *("batch_norm_backward", dy, x, None if save_mask else residual, weight, bias),
            *(*statistics, c.training, c.eps, mask if save_mask else None, *act, output_mask),
            outputs=sizes,
        )
        found = {"y": y, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}
        found |= dict(zip(("running_mean", "running_var"), running, strict=True))
        found["mask"] = mask if save_mask else None
        for profile in s.profiles() if profiles is not None else ():
            profiles(profile)
    for line in s.launches:
        launches(line)
    return {name: t.clone() for name, t in found.items() if t is not None}


def sanitized_environment() -> dict[str, str]:
    """In which a new Python process runs the kernels under address and undefined-behaviour
    sanitizers."""
    compiler = building.compiler() or "g++"
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "BNORM_EXT_EMULATED_LIBRARY": str(build(sanitize=True)),
        "LD_PRELOAD": " ".join(runtimes),
        # Python itself leaks, and torch catches signals.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
