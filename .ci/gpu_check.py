"""Everything that only a GPU can show, in one command: the build for this GPU, all CUDA tests,
compute-sanitizer where the machine allows it, first timings. About a quarter of an hour.

    python .ci/gpu_check.py [--install]

A step that fails or takes too long does not end the others. A table at the end says what became of
each; the exit code is 0 if every step that could run passed. --install installs the package with
pip and what its tests need; without it everything has to be there, and no network is needed.

GPU_CHECK_DRY=1 shows every step on a machine without a GPU: tests are collected, so that an empty
selection fails, the filter of kernels is compared with the sources, the code of the timings walks
with a fake of torch.cuda, other commands are printed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "FAILED", "TIMED OUT", "not run"

# Names are mangled, _ZN9bnorm_ext4cuda...: no "::" in them. Torch's own kernels are left out.
KERNELS = "bnorm_ext"
CUDA_TESTS = (
    "tests/kernels/test_cuda.py",
    "tests/operators/test_operators.py",
    "tests/operators/test_derivatives.py",
    "tests/operators/test_fused_derivatives.py",
    "tests/distributed/test_sync_cuda.py",
)
# Small shapes, since the sanitizer slows kernels down by a factor of 10 to 100.
SANITIZED = "test_results and (odd or blocks) or test_paths and 16x8x16x16"
CAPTURED = "captured"
TIMER_TESTS = "tests/bench/test_bench_graphs.py"


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  #: without the interpreter
    seconds: int  #: after which the step is ended
    environment: Mapping[str, str] = field(default_factory=dict)
    tool: str | None = None  #: of compute-sanitizer
    rehearsal: tuple[str, ...] = ()  #: a command that walks the step's code without a GPU

    @property
    def selects(self) -> bool:
        return self.command[:2] == ("-m", "pytest")


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    note: str
    seconds: float


def pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *arguments)


def build_step(install: bool) -> Step:
    setup = ("setup.py", "--quiet", "build_ext", "--inplace")
    pip = ("-m", "pip", "install", "--no-build-isolation", "-e", ".[test]")
    return Step("build", pip if install else setup, 1200)


def later_steps() -> list[Step]:
    """What follows the build."""
    kernels = "tests/kernels/test_cuda.py"
    # Without torch's own caching every tensor is an allocation whose bounds are known. A captured
    # step needs that cache: cudaMalloc is not allowed while a graph is captured.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = pytest(kernels, "-k", SANITIZED)
    timings = ("-m", "bench", "--device", "cuda", "--suite", "quick")
    results = "bench/results/gpu-check.json"
    walk = ("-m", "pytest", "-q", "-p", "no:cacheprovider", TIMER_TESTS)
    return [
        Step("CUDA tests", pytest(*CUDA_TESTS), 300),
        Step("memcheck", small, 150, uncached, "memcheck"),
        Step("memcheck, graphs", pytest(kernels, "-k", CAPTURED), 100, {}, "memcheck"),
        Step("racecheck", small, 150, uncached, "racecheck"),
        Step("synccheck", small, 150, uncached, "synccheck"),
        Step("timings", (*timings, "--json", results), 240, rehearsal=walk),
    ]


def sanitizer(tool: str) -> list[str]:
    return [
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
        *("--kernel-name", f"kns={KERNELS}"),
    ]


def command_of(step: Step) -> list[str]:
    return [*(sanitizer(step.tool) if step.tool else []), sys.executable, *step.command]


def run(
    command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> tuple[int | None, str]:
    """Runs a command and shows its output; the exit code, None after a time-out, and the output."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # the children too, which hold the pipe open

    timer = threading.Timer(seconds, end)
    timer.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    finally:
        timer.cancel()
    return None if late.is_set() else code, "".join(lines)


def judged(step: Step, code: int | None, output: str) -> tuple[str, str]:
    """State and note of a step that ended."""
    if code is None:
        return TIMED_OUT, f"after {step.seconds} s"
    summary = re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)\b", output)
    note = ", ".join(summary) if step.selects else ""
    if code != 0:
        return FAILED, ", ".join(filter(None, [f"exit code {code}", note]))
    # Tests that all skip themselves pass in pytest's eyes.
    if step.selects and not any("passed" in part for part in summary):
        return FAILED, f"no test ran ({note})"
    return PASSED, note


def sanitizer_missing(tool: str) -> str:
    """Why compute-sanitizer cannot be used on this machine; empty if it can."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH"
    probe = [sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
    try:
        done = subprocess.run(
            [*sanitizer(tool), *probe], capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return "compute-sanitizer does not end on this machine"
    if done.returncode == 0:
        return ""
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return f"compute-sanitizer does not work on this machine: {''.join(last)}"


# --- without a GPU --------------------------------------------------------------------------------


def kernels_beyond_filter() -> list[str]:
    """Kernels in the sources whose mangled names the filter does not match."""
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = path.read_text()
        for match in re.finditer(r"__global__ void[^{;]*?(\w+)\(\w+\*? \w+\)", text):
            around = re.findall(r"^namespace ([\w:]+) \{", text[: match.start()], re.MULTILINE)
            # The mangled name: the length and the text of each namespace, then the kernel's.
            mangled = "".join(f"{len(n)}{n}" for n in "::".join(around).split("::") if n)
            if KERNELS not in mangled + match[1]:
                found.append(f"{path.name}: {match[1]}")
    return found


def rehearsed(step: Step) -> tuple[str, str]:
    """State and note of a step in a dry run."""
    print("$", shlex.join([*(f"{k}={v}" for k, v in step.environment.items()), *command_of(step)]))
    if step.tool and (missed := kernels_beyond_filter()):
        return FAILED, f"the filter misses kernels: {', '.join(missed)}"
    if step.rehearsal:
        command = [sys.executable, *step.rehearsal]
        state, note = judged(step, *run(command, step.environment, step.seconds))
        return state, note or "walked with a fake of torch.cuda"
    if not step.selects:
        return PASSED, "printed"
    done = subprocess.run(
        [sys.executable, *step.command, "--collect-only"], cwd=ROOT, capture_output=True,
        text=True, check=False, env={**os.environ, **step.environment},
    )  # fmt: skip
    count = len(re.findall(r"^tests/.*::", done.stdout, re.MULTILINE))
    if done.returncode != 0 or count == 0:
        print((done.stdout + done.stderr)[-2000:])
        return FAILED, f"the selection is empty or wrong (exit code {done.returncode})"
    return PASSED, f"{count} tests collected"


# --- the whole ------------------------------------------------------------------------------------


def visible_archs() -> list[str]:
    """Compute capabilities of the GPUs that torch sees, in the form of TORCH_CUDA_ARCH_LIST."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {torch.cuda.get_device_capability(i) for i in range(count)}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def perform(step: Step, dry: bool, unable: str) -> Outcome:
    start = time.monotonic()
    print(f"\n=== {step.name}", flush=True)
    if dry:
        state, note = rehearsed(step)
    elif unable or (step.tool and (unable := sanitizer_missing(step.tool))):
        state, note = NOT_RUN, unable
        print(f"not run: {note}", flush=True)
    else:
        state, note = judged(step, *run(command_of(step), step.environment, step.seconds))
    return Outcome(step.name, state, note, time.monotonic() - start)


def report(outcomes: Sequence[Outcome]) -> int:
    """Prints the table; returns the exit code."""
    print(f"\n=== GPU check\n{'step':<18} {'outcome':<10} {'seconds':>7}")
    for o in outcomes:
        print(f"{o.name:<18} {o.state:<10} {o.seconds:>7.0f}  {o.note}".rstrip())
    return int(any(o.state in (FAILED, TIMED_OUT) for o in outcomes))


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--install"}:
        print(__doc__, file=sys.stderr)
        return 2
    dry = os.environ.get("GPU_CHECK_DRY", "0") not in ("", "0")
    archs = visible_archs()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    os.environ.update(PYTHONUNBUFFERED="1", BNORM_EXT_CUDA="1", BNORM_EXT_LINEINFO="1")
    # Before the first build, which then is the only one.
    os.environ["TORCH_CUDA_ARCH_LIST"] = (
        ";".join(archs) or os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0"
    )
    print(f"GPUs: {' '.join(archs) or 'none'}; build for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    (ROOT / "bench" / "results").mkdir(parents=True, exist_ok=True)

    outcomes = [perform(build_step("--install" in arguments), dry, "")]
    unable = "" if outcomes[0].state == PASSED else "the build failed"
    if not archs and not dry:
        outcomes.append(Outcome("GPU", FAILED, "there is no CUDA device: built, nothing run", 0))
        unable = unable or "there is no CUDA device"
    outcomes += [perform(step, dry, unable) for step in later_steps()]
    return report(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
