"""csrc/cpu/division.h: how evenly the work of a call is divided among threads, counted in elements.

More threads than this machine has cannot be timed here, but what each of them gets can be counted.
"""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from bnorm_ext.bench.nets import batch_norm_inputs

ROOT = Path(__file__).resolve().parents[2]
PASSES = {
    "moments", "normalise", "moments_before_mask", "normalise_with_mask", "sums", "dx",
    "inference", "inference_with_mask",
}  # fmt: skip


class Share(NamedTuple):
    shape: str
    pass_: str
    threads: int
    busiest: float  # elements of the busiest thread, over those of each if all had the same


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[Share]:
    """Of every batch norm of ResNet-50 and MobileNetV2, in batches of 16, 32 and 64, of at least
    1 MB, in both layouts and in float32 and 16-bit."""
    program = tmp_path_factory.mktemp("shares") / "shares"
    source = Path(__file__).resolve().parent / "cpu_plan" / "shares.cpp"
    csrc = Path(os.environ.get("BNORM_EXT_CSRC", ROOT / "csrc"))
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    # In place of torch's headers: threads that count, before those that run.
    instead = [source.parent / "stub", source.parents[1] / "standalone" / "include"]
    includes = [f"-I{folder}" for folder in (csrc, *instead)]
    subprocess.run([*command, *includes, str(source), "-o", str(program)], check=True)
    shapes = {
        shape
        for net in ("resnet50", "mobilenet_v2")
        for batch in (16, 32, 64)
        for _, shape in batch_norm_inputs(net, batch)
    }
    lines = [
        f"{n} {c} {math.prod(rest)} {last} {bytes_}"
        for n, c, *rest in sorted(shapes)
        for last in (0, 1)
        for bytes_ in (2, 4)
        if n * c * math.prod(rest) * bytes_ >= 1 << 20
    ]
    # (N, C) inputs, from few channels to many.
    lines += [f"{n} {c} 1 0 4" for n, c in ((65536, 16), (65536, 64), (4096, 256), (512, 4096))]
    assert len(lines) > 150
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True, timeout=240
    )
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("#"):
            shape = line[2:]
            continue
        pass_, threads, busiest = line.split()
        found.append(Share(shape, pass_, int(threads), float(busiest)))
    assert len(found) == len(lines) * len(PASSES) * 64
    return found


@pytest.mark.parametrize("pass_", sorted(PASSES))
def test_threads_share_the_work_equally(shares, pass_):
    those = [s for s in shares if s.pass_ == pass_]
    assert {s.threads for s in those} == set(range(1, 65))
    assert max(those, key=lambda s: s.busiest).busiest <= 1.15
