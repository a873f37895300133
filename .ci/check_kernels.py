"""What the compiler says of every CUDA kernel: registers, shared memory, stack.

Fails on more spills than SPILLS_AT_MOST, where kernels on chip do without asynchronous copies,
where they or sweeps do without 16-byte accesses, on kinds of instructions that no test executes
in the emulator's PTX engine, and where main loops exceed their budget (.ci/kernel_budget.py).

python .ci/check_kernels.py [ARCH ...]    architectures like 80 or 90 (default: both)

Needs nvcc (CUDA_HOME or PATH), cuobjdump (of the toolkit or of triton) and an importable torch,
whose headers the kernels take c10's Half and BFloat16 from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

# Of bnorm_ext the Python files alone are needed, which are there before anything is compiled.
os.environ["BNORM_EXT_DISABLE"] = "1"

import kernel_budget  # noqa: E402

import build_cuda  # noqa: E402
import build_support as support  # noqa: E402
from bnorm_ext.bench.static.compile import disassembled  # noqa: E402
from bnorm_ext.bench.static.kernels import Counts  # noqa: E402

EXECUTED = ROOT / "tests" / "ptx" / "executed.txt"
#: Bytes per thread that a kernel's variants for vectors of eight 16-bit values may spill, stores
#: and loads together; no other kernel may. At two blocks per multiprocessor a thread has 128
#: registers, and these variants keep sums or constants of eight values beside the vectors that are
#: in flight. Whether fewer of them in flight, without spills, are faster is not yet measured.
SPILLS_AT_MOST = {
    "resident_forward_kernel": 88,
    "resident_backward_kernel": 228,
    "sweep_forward_kernel": 28,
    "sweep_backward_kernel": 24,
    "backward_reduce_kernel": 72,
}
OF_EIGHT = re.compile(r"Variant<(Half|BFloat16), 8,")

NAMESPACES = re.compile(r"bnorm_ext::cuda::|\(anonymous namespace\)::|c10::|^void ")

MAPPING = re.compile(r"\(Mapping\)(\d)")
MAPPINGS = ("ChannelsFirst", "ChannelsLast", "ChannelGroups")  # csrc/cuda/plan.h


def nvcc() -> str:
    toolkit = build_cuda.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        raise SystemExit(f"check_kernels: {toolkit}")
    return f"{toolkit.home}/bin/nvcc"


def compile_kernels(
    compiler: str, source: Path, arch: str, include: Path
) -> tuple[str, str, list[Counts]]:
    """What the assembler reports, the PTX, and what the loops take. Nothing is compiled for the
    host."""
    command = [compiler, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", "-Xptxas=-v"]
    command += ["-isystem", str(include), "-cubin", str(source)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"check_kernels: {' '.join(command)}\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        listing = disassembled(Path(folder) / "kernels.cubin")
        return done.stderr, ptx.read_text(), kernel_budget.counted(source.name, listing)


_COPY = r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 16"
#: What the PTX of each kernel has to contain that does not take a value at a time, by the beginning
#: of its name. Sweeps read for the last time by accesses that evict first (.cs), and write by such
#: ones where the tensor is larger than the L2.
NEEDED = {
    "resident_": {
        "asynchronous copies of 16 bytes": _COPY,
        "16-byte reads of shared memory": r"ld\.shared\.v4\.",
        "16-byte stores": r"st\.global\.v4\.",
    },
    "sweep_": {
        "16-byte loads": r"ld\.global\.v4\.",
        "16-byte loads that evict first": r"ld\.global\.cs\.v4\.",
        "16-byte stores": r"st\.global\.v4\.",
        "16-byte stores that evict first": r"st\.global\.cs\.v4\.",
    },
}


# In a mangled name: the template that is in NEEDED, behind its length; and Variant<T, 1, ...>.
KIND = re.compile(rf"\d({'|'.join(NEEDED)})\w+_kernelI")
NARROW = re.compile(r"7VariantI.*?Li1E")


def missing(source: Path, arch: str, ptx: str) -> tuple[set[str], list[str]]:
    """The beginnings of names in NEEDED that there are kernels of, and a line for each kernel and
    instruction that is not there."""
    read: set[str] = set()
    lines: list[str] = []
    for entry in ptx.split(".entry ")[1:]:
        name = entry.split("(")[0]
        match = KIND.search(name)
        if match is None or NARROW.search(name):
            continue
        read.add(match[1])
        lines += [
            f"{source.name} sm_{arch} {name}: no {what}"
            for what, pattern in NEEDED[match[1]].items()
            if not re.search(pattern, entry)
        ]
    return read, lines


def not_executed(ptx: str) -> set[str]:
    """The kinds of instructions that no test has executed in the emulator's PTX engine."""
    from cuda_emulator import ptx as interpreter

    lines = EXECUTED.read_text().splitlines()
    executed = {line.rsplit("  ", 1)[0] for line in lines if not line.startswith("#")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.ptx"
        file.write_text(ptx)
        try:
            return {kind for _, _, kind in interpreter.listed(file)} - executed
        except interpreter.Failed as error:
            return {str(error).strip()}


def kernels(report: str) -> list[tuple[str, dict[str, int]]]:
    """(mangled name, figures) of every kernel in what `ptxas -v` printed."""
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        figures = {"shared": 0}
        for key, pattern in (
            ("stack", r"(\d+) bytes stack frame"),
            ("spills", r"(\d+) bytes spill stores"),
            ("loads", r"(\d+) bytes spill loads"),
            ("registers", r"Used (\d+) registers"),
            ("shared", r"(\d+) bytes smem"),
        ):
            match = re.search(pattern, part)
            if match:
                figures[key] = int(match[1])
        found.append((name, figures))
    return found


def readable(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    lines = [NAMESPACES.sub("", line) for line in done.stdout.splitlines()]
    # Not the parameters, which follow the last "(".
    return [MAPPING.sub(lambda m: MAPPINGS[int(m[1])], line.rpartition("(")[0]) for line in lines]


def may_spill(name: str) -> int:
    """Bytes, of a kernel by its readable name."""
    return SPILLS_AT_MOST.get(name.split("<")[0], 0) if OF_EIGHT.search(name) else 0


def main() -> None:
    import torch

    include = Path(torch.__file__).parent / "include"
    update = "--update-budget" in sys.argv[1:]
    archs = [arch for arch in sys.argv[1:] if arch != "--update-budget"] or ["80", "90"]
    jobs = [(s, a) for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for a in archs]
    compiler = nvcc()
    with ThreadPoolExecutor(support.usable_cores()) as pool:
        compiled = list(pool.map(lambda job: compile_kernels(compiler, *job, include), jobs))
    rows = []
    absent: list[str] = []
    unknown: set[str] = set()
    found_kinds: set[str] = set()
    counts: list[Counts] = []
    for (source, arch), (report, ptx, in_loops) in zip(jobs, compiled, strict=True):
        counts += in_loops
        found = kernels(report)
        names = readable([name for name, _ in found])
        rows += [
            (source.name, f"sm_{arch}", name, figures)
            for name, (_, figures) in zip(names, found, strict=True)
        ]
        unknown |= not_executed(ptx)
        read, lines = missing(source, arch, ptx)
        found_kinds |= read
        absent += lines
    print(f"{'file':22}{'arch':8}{'kernel':82}{'registers':>10}{'shared':>8}{'stack':>7}")
    for file, arch, name, f in sorted(rows, key=lambda row: row[:3]):
        print(f"{file:22}{arch:8}{name:82}{f['registers']:10}{f['shared']:8}{f['stack']:7}")
    spilling = [row for row in rows if row[3]["spills"] or row[3]["loads"]]
    too_many = 0
    for file, arch, name, f in spilling:
        most = may_spill(name)
        too_many += f["spills"] + f["loads"] > most
        print(f"SPILLS: {file} {arch} {name}: {f['spills']} + {f['loads']} bytes, at most {most}")
    absent += [f"any {kind}*_kernel" for kind in NEEDED if kind not in found_kinds]
    for line in absent:
        print(f"MISSING: {line}")
    for kind in sorted(unknown):
        print(f"NOT EXECUTED by any test of the PTX engine (tests/ptx/executed.txt): {kind}")
    print(f"{len(rows)} kernels, {len(spilling)} with spills")
    if update:
        kernel_budget.write(kernel_budget.budget_of(counts))
    over = kernel_budget.beyond(counts, kernel_budget.read())
    for line in over:
        print(f"BUDGET (.ci/kernel_budget.json): {line}")
    print(f"{len(counts)} instances with counted loops, {len(over)} beyond their budget")
    if not rows or too_many or absent or unknown or over:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
