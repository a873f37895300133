"""csrc/cpu/plan.h: how evenly the work of a call is divided among threads, counted in elements.

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
GRAIN = 32768  # elements that are worth a thread, kGrain in plan.h


class Share(NamedTuple):
    shape: str
    channels_last: bool
    kind: str  # forward, backward or inference
    threads: int
    busiest: float  # elements of the busiest thread, over those of each if all had the same


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[Share]:
    """Of every batch norm of ResNet-50 and MobileNetV2, in batches of 16 and 32, of at least 1 MB,
    in both layouts and in float32 and 16-bit."""
    program = tmp_path_factory.mktemp("shares") / "shares"
    source = Path(__file__).resolve().parent / "cpu_plan" / "shares.cpp"
    csrc = Path(os.environ.get("BNORM_EXT_CSRC", ROOT / "csrc"))
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, f"-I{csrc}", str(source), "-o", str(program)], check=True)
    shapes = {
        shape
        for net in ("resnet50", "mobilenet_v2")
        for batch in (16, 32)
        for _, shape in batch_norm_inputs(net, batch)
    }
    lines = [
        f"{n} {c} {math.prod(rest)} {last} {bytes_}"
        for n, c, *rest in sorted(shapes)
        for last in (0, 1)
        for bytes_ in (2, 4)
        if n * c * math.prod(rest) * bytes_ >= 1 << 20
    ]
    assert len(lines) > 100
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True, timeout=120
    )
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("#"):
            n, c, s, last, _ = (int(word) for word in line[1:].split())
            shape = f"{n}x{c}x{s}"
            continue
        kind, threads, working, busiest = line.split()
        # No more threads than there are grains of work.
        wanted = min(int(threads), n * c * s // GRAIN)
        share = float(busiest) * wanted / int(working)
        found.append(Share(shape, last == 1, kind, int(threads), share))
    return found


def test_up_to_four_threads_share_contiguous_work_equally(shares):
    those = [s for s in shares if s.threads <= 4 and not s.channels_last]
    assert len(those) > 500
    assert max(those, key=lambda s: s.busiest).busiest <= 1.15


def test_inference_in_channels_last_is_shared_equally(shares):
    those = [s for s in shares if s.kind == "inference" and s.channels_last]
    assert {s.threads for s in those} == set(range(1, 65))
    assert max(those, key=lambda s: s.busiest).busiest <= 1.15
