"""What the compiler says of every CUDA kernel: registers, shared memory, stack.

Fails on spills, and where kernels on chip do without asynchronous copies or 16-byte accesses.

python .ci/check_kernels.py [ARCH ...]    architectures like 80 or 90 (default: both)

Needs nvcc (CUDA_HOME or PATH) and an importable torch, whose headers the kernels take c10's Half
and BFloat16 from.
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
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
import build_support as support  # noqa: E402

NAMESPACES = re.compile(r"bnorm_ext::cuda::|\(anonymous namespace\)::|c10::|^void ")


def nvcc() -> str:
    toolkit = build_cuda.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        raise SystemExit(f"check_kernels: {toolkit}")
    return f"{toolkit.home}/bin/nvcc"


def compile_report(compiler: str, source: Path, arch: str, include: Path) -> str:
    command = [compiler, "-std=c++17", "-O3", "-fmad=false", "-lineinfo", f"-arch=sm_{arch}"]
    command += ["-isystem", str(include), "-Xptxas=-v", "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"check_kernels: {' '.join(command)}\n{done.stderr}")
    return done.stderr


#: What the PTX of each kernel on chip has to contain that does not take a value at a time.
ON_CHIP = {
    "asynchronous copies of 16 bytes": r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 16",
    "16-byte reads of shared memory": r"ld\.shared\.v4\.",
    "16-byte stores": r"st\.global\.v4\.",
}


# Variant<T, 1, ...> in a mangled name.
NARROW = re.compile(r"7VariantI.*?Li1E")


def missing_on_chip(compiler: str, source: Path, arch: str, include: Path) -> list[str]:
    """A line for each kernel and instruction that is not there."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        command = [compiler, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", "-ptx"]
        command += ["-isystem", str(include), str(source), "-o", str(ptx)]
        subprocess.run(command, check=True, timeout=600)
        entries = ptx.read_text().split(".entry ")[1:]
    assert entries, source
    return [
        f"{source.name} sm_{arch} {entry.split('(')[0]}: no {what}"
        for entry in entries
        if not NARROW.search(entry.split("(")[0])
        for what, pattern in ON_CHIP.items()
        if not re.search(pattern, entry)
    ]


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
    return [NAMESPACES.sub("", line).split("(")[0] for line in done.stdout.splitlines()]


def main() -> None:
    import torch

    include = Path(torch.__file__).parent / "include"
    archs = sys.argv[1:] or ["80", "90"]
    jobs = [(s, a) for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for a in archs]
    compiler = nvcc()
    with ThreadPoolExecutor(support.usable_cores()) as pool:
        reports = list(pool.map(lambda job: compile_report(compiler, *job, include), jobs))
    rows = []
    for (source, arch), report in zip(jobs, reports, strict=True):
        found = kernels(report)
        names = readable([name for name, _ in found])
        rows += [
            (source.name, f"sm_{arch}", name, figures)
            for name, (_, figures) in zip(names, found, strict=True)
        ]
    print(f"{'file':22}{'arch':8}{'kernel':60}{'registers':>10}{'shared':>8}{'stack':>7}")
    for file, arch, name, f in sorted(rows, key=lambda row: row[:3]):
        print(f"{file:22}{arch:8}{name:60}{f['registers']:10}{f['shared']:8}{f['stack']:7}")
    spilling = [row for row in rows if row[3]["spills"] or row[3]["loads"]]
    for file, arch, name, f in spilling:
        print(f"SPILLS: {file} {arch} {name}: {f['spills']} + {f['loads']} bytes")
    on_chip = sorted((ROOT / "csrc" / "cuda").glob("resident_*.cu"))
    with ThreadPoolExecutor(support.usable_cores()) as pool:
        ptx = [(s, a) for s in on_chip for a in archs]
        lines = pool.map(lambda job: missing_on_chip(compiler, *job, include), ptx)
        missing = [line for found in lines for line in found]
    for line in missing:
        print(f"MISSING: {line}")
    print(f"{len(rows)} kernels, {len(spilling)} with spills; {len(ptx)} files on chip read")
    if not rows or not ptx or spilling or missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
