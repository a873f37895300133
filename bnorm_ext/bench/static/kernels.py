"""The CUDA kernels: what is compiled, what their loops do, what is counted of each."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnorm_ext.activations import NAMES

from .compile import CSRC, host_compiler
from .counts import Pass, loop_pass, straight_pass
from .flow import Flow, Loop
from .sass import Function

# Variant<dtype, width, mapping, plain>; plain: compiled without an epilogue
_VARIANT = re.compile(
    r"7VariantI(f|d|N3c108BFloat16E|N3c104HalfE)Li(\d+)ELNS0_7MappingE(\d)ELb([01])E"
)
_DTYPES = {"f": "float32", "d": "float64", "N3c108BFloat16E": "bfloat16", "N3c104HalfE": "float16"}
_ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MAPPINGS = ("channels_first", "channels_last", "channel_groups")


@dataclass(frozen=True)
class Kernel:
    """One of the source's kernel templates."""

    name: str  # in the source
    file: str
    params: str  # its parameter struct
    read: int  # tensors [N, C, S] that it reads without a residual
    sums: int = 0  # loops over the tile that add something up
    writes: int = 0  # loops that store a result

    @property
    def on_chip(self) -> bool:
        """Whether it copies its tile into shared memory, and computes from there."""
        return self.name.startswith("resident")


KERNELS = (
    Kernel("statistics_kernel", "two_pass_forward.cu", "StatisticsParams", 1, 1, 0),
    Kernel("normalise_kernel", "two_pass_forward.cu", "NormaliseParams", 1, 0, 1),
    Kernel("backward_reduce_kernel", "two_pass_backward.cu", "BackwardReduceParams", 2, 1, 0),
    Kernel("backward_apply_kernel", "two_pass_backward.cu", "BackwardApplyParams", 2, 0, 1),
    Kernel("resident_forward_kernel", "resident_forward.cu", "ResidentForwardParams", 1, 1, 1),
    Kernel("resident_backward_kernel", "resident_backward.cu", "ResidentBackwardParams", 2, 1, 1),
    Kernel("sweep_forward_kernel", "resident_forward.cu", "ResidentForwardParams", 1, 1, 1),
    Kernel("sweep_backward_kernel", "resident_backward.cu", "ResidentBackwardParams", 2, 1, 1),
)


@dataclass(frozen=True)
class LoopCounts:
    """One pass through a main loop."""

    role: str  # fetch: copies into shared memory; sums; write: stores a result
    elements: float  # of one tensor that a thread handles in the pass
    once: Pass

    def per_element(self, unit: str | None = None) -> float:
        counts = self.once.by_unit()
        return (sum(counts.values()) if unit is None else counts[unit]) / self.elements


@dataclass(frozen=True)
class Counts:
    """What one compiled kernel does where there is no activation, residual or mask, or with the
    given ones."""

    kernel: Kernel
    dtype: str
    width: int  # elements of an access
    mapping: str
    arch: int
    registers: int  # of a thread
    loops: tuple[LoopCounts, ...]
    rest: Pass  # what a thread executes once per tile, outside of the loops

    def per_element(self, unit: str | None = None) -> float:
        """In all main loops, for an element of x."""
        return sum(loop.per_element(unit) for loop in self.loops)

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that a multiprocessor has registers for; it gives them out in
        eights."""
        return 65536 // (256 * (max(self.registers, 1) + 7 & ~7))

    @property
    def in_flight(self) -> int:
        """Bytes that the threads of so many blocks ask for in one pass through a main loop, the one
        with the most."""
        loads = (
            sum(i.bits // 8 for i in loop.once.code if i.name in ("LDG", "LDGSTS"))
            for loop in self.loops
        )
        return self.blocks * 256 * max(loads, default=0)


def offsets(fields: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Byte offsets of (parameter struct, field), e.g. ("NormaliseParams", "epilogue.act"), as the
    host's compiler lays them out, which is as nvcc does."""
    lines = "\n".join(
        f'  {{ {s} p; std::printf("%td\\n", reinterpret_cast<char*>(&p.{f}) - '
        "reinterpret_cast<char*>(&p)); }"
        for s, f in fields
    )
    source = (
        "#include <cstdio>\n#include <cstddef>\n"
        f'#include "{CSRC / "cuda" / "params.h"}"\n'
        f"using namespace bnorm_ext::cuda;\nint main() {{\n{lines}\n}}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "offsets"
        (Path(folder) / "offsets.cpp").write_text(source)
        subprocess.run(
            [host_compiler(), "-std=c++17", str(program) + ".cpp", "-o", str(program)],
            check=True, timeout=120,
        )  # fmt: skip
        done = subprocess.run([program], check=True, timeout=60, capture_output=True, text=True)
    return dict(zip(fields, map(int, done.stdout.split()), strict=True))


@functools.cache
def assumptions(
    kernel: Kernel, act: str = "identity", residual: bool = False, mask: bool = False
) -> dict[int, int]:
    """Bytes of the parameters, by offset, of a training step with this activation, with a residual
    (and its gradient) or not, with a mask or not. A pointer that is not null has a 1 in every byte,
    which is enough for every test of it."""
    if kernel.params == "StatisticsParams":
        return {}
    pointers = {"epilogue.residual": residual, "mask.bytes": mask}
    switches = {"epilogue.act": NAMES.index(act)}
    if kernel.params in ("BackwardApplyParams", "ResidentBackwardParams"):
        pointers |= {"dx": True, "dresidual": residual}
    if kernel.params == "BackwardApplyParams":
        pointers["mean_dy"] = True
    if kernel.params in ("NormaliseParams", "BackwardApplyParams"):
        switches["plan.evict_first"] = 0
    if kernel.params.startswith("Resident"):
        switches["plan.tile_plan.evict_first"] = 0
    if kernel.params == "ResidentBackwardParams":
        switches["constant_statistics"] = 0
    at = offsets([(kernel.params, name) for name in (*pointers, *switches)])
    known = {at[kernel.params, name]: value for name, value in switches.items()}
    for name, given in pointers.items():
        known.update({at[kernel.params, name] + k: int(given) for k in range(8)})
    return known


def instance_of(function: Function, kernel: Kernel) -> tuple[str, int, str] | None:
    """dtype, elements of an access and mapping; None for a function of another kernel."""
    match = _VARIANT.search(function.name)
    if match is None or kernel.name not in function.name:
        return None
    return _DTYPES[match[1]], int(match[2]), MAPPINGS[int(match[3])]


def without_epilogue(function: Function) -> bool:
    match = _VARIANT.search(function.name)
    return match is not None and match[4] == "1"


def counts_of(function: Function, kernel: Kernel, assumed: dict[int, int]) -> Counts | None:
    """None for a function of another kernel."""
    instance = instance_of(function, kernel)
    if instance is None:
        return None
    dtype, width, mapping = instance
    bits = 8 * width * _ITEM[dtype]
    flow = Flow(function, assumed)
    loops: list[tuple[Loop, LoopCounts]] = []
    for loop in _innermost(flow.loops):
        found = _role(flow, loop, kernel, width, bits)
        is_around = any(inner.blocks < loop.blocks for inner, _ in loops)  # the loop over tiles
        if found is not None and not is_around:
            loops.append((loop, found))
    # Sums are computed again in double where they are not finite: by further loops, with more
    # FP64, which hardly ever run.
    # What is left of a tile behind its full batches takes a second loop, with more instructions.
    fetches = kernel.read if any(found.role == "fetch" for _, found in loops) else 0
    for role, count in (("fetch", fetches), ("sums", kernel.sums), ("write", kernel.writes)):
        those = [pair for pair in loops if pair[1].role == role]
        if len(those) < count:
            raise ValueError(f"{function.name}: {len(those)} loops of the kind {role}, not {count}")
        if dtype != "float64":  # else all of it is FP64, and the loop of full batches comes first
            those.sort(key=lambda pair: (pair[1].per_element("fp64"), pair[1].per_element()))
        loops = [pair for pair in loops if pair[1].role != role] + those[:count]
    rest = straight_pass(flow, [loop for loop, _ in loops])
    main = tuple(found for _, found in loops)
    return Counts(kernel, dtype, width, mapping, function.arch, function.registers, main, rest)


def _innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Every loop, those inside first."""
    found = []
    for loop in loops:
        found += [*_innermost(loop.inner), loop]
    return found


def _role(flow: Flow, loop: Loop, kernel: Kernel, width: int, bits: int) -> LoopCounts | None:
    once = loop_pass(flow, loop, ("LDG", "STG", "LDS", "LDGSTS"), bits)
    stores, copies = once.accesses("STG", bits), once.accesses("LDGSTS", bits)
    reads = once.accesses("LDS" if kernel.on_chip else "LDG", bits)
    # A loop that writes a tile on chip also starts the copies of the next one. The compiler may
    # split a store of 16 bytes, so that its elements are those that are read.
    if stores or (copies and reads >= kernel.read):
        written = max(stores, reads // kernel.read if kernel.on_chip else 0)
        return LoopCounts("write", written * width, once)
    if copies:
        return LoopCounts("fetch", copies * width, once)
    # Loops that add up doubles of other threads have nothing in the accumulation type.
    computes = any(i.name in ("FADD", "FFMA", "FMUL") for i in once.code) or bits == 64 * width
    if reads >= kernel.read and computes:
        return LoopCounts("sums", reads * width / kernel.read, once)
    return None
