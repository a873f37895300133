"""Runs the tests of the CUDA kernels on what nvcc makes of the kernels: their PTX.

python tests/ptx/run.py               sm_75, sm_80 and sm_90, mutants, and what was executed
python tests/ptx/run.py --archs 80    sm_80 and mutants: every kernel, mapping and path
python tests/ptx/run.py --refresh     everything, and writes executed.txt anew

executed.txt names each kind of instruction in the kernels' PTX, and whether the tests of the
kernels execute it or only those of the interpreter do. A kind that is not there fails here and in
.ci/check_kernels.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from cuda_emulator import ptx as interpreter  # noqa: E402
from tests.common import emulated, ptx  # noqa: E402

EXECUTED = HERE / "executed.txt"
COVERAGE = ptx.FOLDER / "coverage"
SECONDS = 1500  # a job may take no longer

FILES = ["kernels", "fused", "mask", "resident", "runs", "sweeps", "smooth", "memory"]
# Tests that expect the launches of an sm_80. An sm_75 has less shared memory, and an sm_90 more.
OF_SM_80 = {
    (75, "resident"): [
        "test_results[block-few channels-torch.float32]",
        "test_results[block-rows longer than a block-torch.float32]",
        "test_teams[block-shape0-expected0]",
        "test_teams[grid-shape2-expected2]",
        "test_values_that_are_not_finite[grid-inf]",
        "test_values_that_are_not_finite[grid--inf]",
        "test_values_that_are_not_finite[grid-nan]",
        "test_refused_launch_takes_two_passes[grid-groups]",
    ],
    (90, "resident"): ["test_teams[grid-shape2-expected2]"],
}
TOO_LARGE = {(75, "runs")}  # none of the file's tensors fits on an sm_75's chip


@dataclass
class Job:
    arch: int
    file: str
    exp2_error: int = 0  # units in the last place

    def __str__(self) -> str:
        moved = f", exp2 {self.exp2_error:+d} u" if self.exp2_error else ""
        return f"sm_{self.arch} {self.file}{moved}"


@dataclass
class Done:
    job: Job
    passed: bool
    seconds: float
    text: str  # pytest's last line, or its output where a test failed


def pytest(job: Job, folder: Path) -> Done:
    environment = os.environ | {
        "BNORM_EXT_EMULATED_DEVICE": f"sm_{job.arch}",
        "BNORM_EXT_EMULATED_PTX": str(folder),
        "BNORM_EXT_EMULATED_PTX_COVERAGE": str(COVERAGE / str(job)),
        "BNORM_EXT_EMULATED_EXP2_ERROR": str(job.exp2_error),
        "OMP_NUM_THREADS": "1",
    }
    if job.file == "mutants":
        for name in list(environment):
            if name.startswith("BNORM_EXT_EMULATED_PTX"):
                del environment[name]
    test = "ptx/test_ptx" if job.file == "mutants" else "emulated/test_emulated"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "slow" if job.file == "mutants" else "not slow"]
    if job.exp2_error:
        command += ["-k", "silu"]
    if job.file == "memory":  # bank conflicts are told apart by lines of the source
        command += ["-k", "evicted_first"]
    file = f"tests/{test}_{job.file}.py"
    command += [f"--deselect={file}::{name}" for name in OF_SM_80.get((job.arch, job.file), [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, str(ROOT / file)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        code, text = done.returncode, done.stdout.strip() or done.stderr
    except subprocess.TimeoutExpired:
        code, text = 1, f"not done after {SECONDS} s"
    if code == 0:
        text = text.splitlines()[-1]
    return Done(job, code == 0, time.monotonic() - start, text)


def jobs_of(archs: list[int]) -> list[Job]:
    jobs = [Job(arch, file) for arch in archs for file in FILES if (arch, file) not in TOO_LARGE]
    # Hardware may be off by up to 2 units where the interpreter gives the nearest result.
    jobs += [Job(archs[0], "fused", error) for error in (-2, 2)]
    return [*jobs, Job(80, "mutants")]


class Executed:
    """What the processes have written: of each kernel, how often each instruction ran."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, str], Counter[tuple[int, str]]] = {}
        self.launches: Counter[str] = Counter()  # by architecture
        for path in COVERAGE.glob("*"):
            for line in path.read_text().splitlines():
                if line.startswith("kernel "):
                    _, file, kernel, launches = line.split()
                    of_kernel = self.times.setdefault((file, kernel), Counter())
                    self.launches[file.split(".")[1]] += int(launches)
                else:
                    number, times, kind = line.split(" ", 2)
                    of_kernel[int(number), kind] += int(times)

    def kinds(self) -> set[str]:
        return {kind for c in self.times.values() for (_, kind), times in c.items() if times}

    def summary(self) -> list[str]:
        lines = []
        for arch in sorted(self.launches):
            of_arch = [c for (file, _), c in self.times.items() if file.split(".")[1] == arch]
            known = sum(map(len, of_arch))
            executed = sum(times > 0 for c in of_arch for times in c.values())
            lines.append(
                f"sm_{arch}: {len(of_arch)} kernels in {self.launches[arch]} launches, "
                f"{executed} of {known} instructions executed ({executed / known:.0%})"
            )
        return lines


def listed(text: str) -> dict[str, str]:
    """Kinds in executed.txt, and who executes them."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.rsplit("  ", 1) for line in lines)


def judge(files: list[Path], executed: Executed, refresh: bool, whole: bool) -> list[str]:
    """What is wrong with executed.txt. `whole`: everything was run, so that it must be equal."""
    with ThreadPoolExecutor(ptx.JOBS) as pool:
        kinds = {kind for rows in pool.map(interpreter.listed, files) for _, _, kind in rows}
    by_kernels = executed.kinds()
    found = {kind: "kernels" if kind in by_kernels else "interpreter" for kind in kinds}
    head = [line for line in EXECUTED.read_text().splitlines() if line.startswith("#")]
    if refresh:
        rows = [f"{kind}  {by}" for kind, by in sorted(found.items())]
        EXECUTED.write_text("\n".join([*head, *rows]) + "\n")
    committed = listed(EXECUTED.read_text())
    wrong = [f"not in executed.txt: {kind}" for kind in sorted(kinds - committed.keys())]
    if whole:
        wrong += [f"in no kernel any more: {kind}" for kind in sorted(committed.keys() - kinds)]
        wrong += [
            f"{kind}: executed by the tests of the {by}, executed.txt says {committed[kind]}"
            for kind, by in sorted(found.items())
            if kind in committed and committed[kind] != by
        ]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--archs", nargs="+", type=int, default=[75, 80, 90])
    options = parser.parse_args()
    if ptx.nvcc() is None:
        print(f"skipped: {ptx.NO_NVCC}")
        return
    start = time.monotonic()
    emulated.library()  # compiles it
    shutil.rmtree(COVERAGE, ignore_errors=True)
    COVERAGE.mkdir(parents=True)
    files = ptx.compile_all(ptx.SOURCES, options.archs)
    # Some tests of kernels on chip choose their device: clusters are of sm_90 alone.
    on_chip = [source for source in ptx.SOURCES if source.startswith("resident")]
    files |= ptx.compile_all(on_chip, [75, 90])
    folder = ptx.folder_of("kernels", files)
    print(f"compiled {len(files)} files, {time.monotonic() - start:.0f} s", flush=True)

    jobs = jobs_of(options.archs)
    failed = 0
    with ThreadPoolExecutor(ptx.JOBS) as pool:
        for done in pool.map(lambda job: pytest(job, folder), jobs):
            failed += not done.passed
            print(f"{done.job!s:28} {done.seconds:5.0f} s  {done.text}", flush=True)
    executed = Executed()
    print("\n".join(executed.summary()))
    whole = options.archs == [75, 80, 90]
    wrong = judge(list(files.values()), executed, options.refresh, whole)
    print("\n".join(wrong))
    print(f"{len(jobs)} jobs, {failed} failed, {time.monotonic() - start:.0f} s")
    raise SystemExit(bool(failed or wrong))


if __name__ == "__main__":
    main()
