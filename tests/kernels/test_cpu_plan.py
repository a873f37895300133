"""What of the CPU kernels' speed can be counted: how evenly csrc/cpu/division.h divides the work of
a call among threads, and in what order csrc/cpu/sums.h prefetches.

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
CSRC = Path(os.environ.get("BNORM_EXT_CSRC", ROOT / "csrc"))
SOURCES = Path(__file__).resolve().parent / "cpu_plan"
PASSES = {
    "moments", "normalise", "moments_before_mask", "normalise_with_mask", "sums", "dx",
    "inference", "inference_with_mask",
}  # fmt: skip


class Share(NamedTuple):
    shape: str
    pass_: str
    threads: int
    busiest: float  # elements of the busiest thread, over those of each if all had the same
    narrow: float  # share of the elements taken in parts of less than 3/4 of the channels

    @property
    def channels_last(self) -> bool:
        return self.shape.split()[3] == "1"

    @property
    def row(self) -> int:
        """Values in a row of channels-last data: its channels."""
        return int(self.shape.split()[1])

    @property
    def rows(self) -> int:
        n, _, s, *_ = map(int, self.shape.split())
        return n * s


def compiled(name: str, folder: Path, *includes: Path) -> Path:
    program = folder / name
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{include}" for include in (CSRC, *includes)]
    subprocess.run([*command, str(SOURCES / f"{name}.cpp"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[Share]:
    """Of every batch norm of ResNet-50 and MobileNetV2, in batches of 16, 32 and 64, of at least
    1 MB, in both layouts and in float32 and 16-bit."""
    # In place of torch's headers: threads that count, before those that run.
    instead = [SOURCES / "stub", SOURCES.parent / "standalone" / "include"]
    program = compiled("shares", tmp_path_factory.mktemp("shares"), *instead)
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
        pass_, threads, busiest, narrow = line.split()
        found.append(Share(shape, pass_, int(threads), float(busiest), float(narrow)))
    assert len(found) == len(lines) * len(PASSES) * 64
    return found


@pytest.mark.parametrize("pass_", sorted(PASSES))
def test_threads_share_the_work_equally(shares, pass_):
    those = [s for s in shares if s.pass_ == pass_]
    assert {s.threads for s in those} == set(range(1, 65))
    assert max(those, key=lambda s: s.busiest).busiest <= 1.15


@pytest.mark.parametrize("pass_", ["moments", "sums"])
def test_two_threads_take_whole_rows(shares, pass_):
    """A thread reads half of every row slower than all of half the rows. Parts of rows remain where
    two equal shares meet within a chunk. Rows under 128 values are not held to this: there it made
    no difference that could be measured."""
    those = [
        s
        for s in shares
        if (s.pass_, s.threads, s.channels_last) == (pass_, 2, True)
        and s.row >= 128
        and s.rows >= 128
    ]
    assert len(those) > 50
    assert max(those, key=lambda s: s.narrow).narrow <= 0.05


LINE = 16  # elements of a cache line
AHEAD = 16  # rows


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """ahead(rows, width, stride): of a tile of float32, the elements that are prefetched, in order,
    and the elements that had been read before each."""
    program = compiled("ahead", tmp_path_factory.mktemp("ahead"))

    def run(rows: int, width: int, stride: int) -> list[tuple[int, int]]:
        text = f"{rows} {width} {stride}"
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        numbers = list(map(int, done.stdout.split()))
        vector = 4  # without flags for another instruction set
        return [(e, vector * n) for e, n in zip(numbers[::2], numbers[1::2], strict=True)]

    return run


@pytest.mark.parametrize("width", [32, 96, 144, 1008])
def test_rows_are_prefetched_in_memory_order(ahead, width):
    rows = 64
    found = ahead(rows, width, width)
    elements = [element for element, _ in found]
    assert elements == list(range(AHEAD * width, (rows + AHEAD) * width, LINE))
    # While four rows are read, as many are prefetched, sixteen rows further on.
    for element, before in found:
        assert 4 * width >= element - AHEAD * width - before >= -LINE


@pytest.mark.parametrize("width", [16, 48, 80, 512])
def test_columns_beside_a_tile_are_not_prefetched(ahead, width):
    rows, stride = 64, 2 * width + LINE
    elements = [element for element, _ in ahead(rows, width, stride)]
    wanted = [
        row * stride + j for row in range(AHEAD, rows) for j in range(0, width, LINE)
    ]  # and none behind the tile
    assert elements == wanted


def test_rows_of_pages_are_left_to_the_hardware(ahead):
    assert ahead(64, 1024, 1024) == ahead(64, 2048, 4096) == []


def test_widths_that_are_no_lines(ahead):
    """A line more or less at the end of a row; the next rows begin where they begin."""
    rows, width, stride = 64, 40, 200
    elements = [element for element, _ in ahead(rows, width, stride)]
    assert {row * stride for row in range(AHEAD, rows, 4)} <= set(elements)
    assert all(element % stride < width for element in elements)
    assert elements == sorted(elements)
