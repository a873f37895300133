"""The emulator itself: kernels without a mistake run and give the right results, kernels with one
are reported for it, and launches are refused where CUDA refuses them. The kernels are in
cuda_emulator/selftest/."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cuda_emulator import building
from cuda_emulator.selftest.reports import BROKEN, expected_report

SEEDS = ["1", "2", "3"]

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program() -> Path:
    return building.selftest()


def run(program: Path, case: str, seeds: list[str], timeout: float = 60) -> tuple[int, str]:
    """The exit status and what was printed: one report per line."""
    done = subprocess.run(
        [str(program), case, *seeds], capture_output=True, text=True, check=False, timeout=timeout
    )
    return done.returncode, done.stdout


CORRECT = [
    "block_reduction",
    "last_block",
    "cluster_reduction",
    "grid_sum",
    "double_buffer",
    "votes",
    "syncwarp_pairs",
    "chain",
    "semaphore_set_back",
    "small_pieces",
    "ring",
    "two_launches",
    "counters",
    "acquired",
]
LIMITS = ["shapes", "shared_memory", "clusters", "cooperative", "bank_conflicts", "stores"]


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels(program: Path, case: str):
    status, output = run(program, case, [str(seed) for seed in range(1, 13)])
    assert (status, output) == (0, "")


@pytest.mark.parametrize("case", LIMITS)
def test_limits(program: Path, case: str):
    assert run(program, case, ["1"]) == (0, "")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_kernels(program: Path, case: str):
    for seed in SEEDS:
        status, output = run(program, case, [seed])
        assert status == 1, output
        assert expected_report(case, seed).search(output), output


def test_every_case_is_tested(program: Path):
    listed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    *cases, fibers = listed.splitlines()
    assert sorted(cases) == sorted([*CORRECT, *LIMITS, *BROKEN])
    assert fibers == f"fibers: {'boost' if building.has_boost_context() else 'ucontext'}"


# Commands of README.md and the report that follows each there, shortened where it ends in "...".
SHOWN = re.findall(r"^\$ (.+)\n(\w+: .+)$", (building.HERE / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("command", "report"), SHOWN, ids=[command for command, _ in SHOWN])
def test_reports_of_the_readme(program: Path, command: str, report: str):
    if command == "/tmp/example":
        example = building.build("example", [building.HERE / "example.cu"])
        output = subprocess.run([example], capture_output=True, text=True, check=True).stdout
    else:
        case, seed = command.removeprefix("python -m cuda_emulator.selftest ").split()
        _, output = run(program, case, [seed])
    whole = report.removesuffix(" ...")
    assert any(line.startswith(whole) for line in output.splitlines())


def test_the_readme_shows_each_kind_of_report():
    kinds = {kind for kind, _ in BROKEN.values() if kind and "|" not in kind} | {"unwritten"}
    assert {report.split(":")[0] for _, report in SHOWN} == kinds


def test_the_same_seed_gives_the_same_order(program: Path):
    outputs = [run(program, "racing_workspace", [seed]) for seed in ["5", "5", "6"]]
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_ucontext():
    """Where Boost.Context is installed, the other tests do not use this."""
    program = building.selftest(fibers="ucontext")
    for case in CORRECT:
        assert run(program, case, SEEDS) == (0, "")
    for case in ["missing_barrier", "barrier_against_shuffle", "masks_differ"]:
        status, output = run(program, case, ["1"])
        assert status == 1
        assert expected_report(case, "1").search(output), output


@pytest.mark.slow
def test_sanitizers():
    """The emulator's own memory errors, in launches that end and in launches that are given up."""
    try:
        program = building.selftest(sanitize=True)
    except RuntimeError as error:
        if "cannot find" in str(error):
            pytest.skip("no sanitizer libraries")
        raise
    for case in CORRECT:
        assert run(program, case, SEEDS) == (0, "")
    for case in BROKEN:
        if case == "plain_tail":
            continue  # the address sanitizer ends the program at the store
        status, output = run(program, case, ["1"])
        assert status == 1
        assert expected_report(case, "1").search(output), output


# Statements of a kernel, and whether they compile.
STATEMENTS = {
    "atomicAdd(u, 1u); atomicAdd(w, 1u); atomicAdd(&s[1], 1); atomicCAS(l, 0ull, 1ull);": True,
    "double v = d[1]; d[2] = v; d[3] = d[4]; *d = 1; d += 2; v = max(v, 1.0f) + min(1, 2u);": True,
    "float f = 0; atomicAdd(&f, 1.0f);": False,
    "double f = 0; atomicAdd(&f, 1.0);": False,
    "atomicAdd(d, 1.0);": False,
    "d[0] += 1;": False,
    "double* p = d;": False,
    "__shfl_sync(~0u, short(1), 0);": False,
}


@pytest.mark.parametrize(("statement", "compiles"), STATEMENTS.items())
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_what_compiles(tmp_path: Path, statement: str, compiles: bool, standard: str):
    source = tmp_path / "kernel.cu"
    source.write_text(
        "#include <cuda/platform.cuh>\n"
        "using namespace bnorm_ext::cuda;\n"
        "__global__ void kernel(unsigned* u, Workspace<unsigned> w, unsigned long long* l) {\n"
        "  Shared<double> d = dynamic_shared<double>(0);\n"
        "  Shared<int> s = dynamic_shared<int>(64);\n"
        f"  {statement}\n"
        "  (void)u, (void)w, (void)l, (void)d, (void)s;\n"
        "}\n"
    )
    includes = ["-I", str(building.INCLUDE), "-I", str(building.ROOT / "csrc")]
    flags = ["-Wall", "-Wextra", "-fsyntax-only", "-DBNORM_EXT_EMULATOR", f"-std={standard}"]
    done = building.run_compiler([*flags, *includes, "-x", "c++", str(source)])
    assert (done.returncode == 0) == compiles, done.stderr
    if compiles:
        assert done.stderr == ""
