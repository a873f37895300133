"""PTX of the kernels that was broken on purpose is noticed: each mutant is an edit of what nvcc
made, and the case that executes it has to fail for the reason that is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common import emulated, ptx
from tests.common.cases import Case, assert_promise
from tests.common.emulated_cases import assert_right, fused, made, without_kinks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx.nvcc() is None, reason=ptx.NO_NVCC),
]

BLOCK = {"path": "block"}
CLUSTER = {"path": "cluster", "device": "sm_90", "multiprocessors": 4}
GRID = {"path": "grid", "multiprocessors": 3}
MANY = {"path": "two_pass", "multiprocessors": 8}

VECTORS = made((8, 2, 32, 48), torch.float32, "contiguous")
SMALL = made((4, 6, 4, 8), torch.float32, "contiguous")
TEAMS = made((24, 2, 32, 48), torch.float32, "contiguous")
PAIRS = made((4, 6, 4, 8), torch.bfloat16, "contiguous")
# Vectors of a channel: 784, four for each of a warp's first 16 lanes and three for each other one.
ODD_BATCHES, MASK = fused((4, 2, 28, 28), torch.float32, "contiguous", "relu", True)
MASKED = without_kinks(ODD_BATCHES, MASK)


@dataclass
class Mutant:
    source: str  # of csrc/cuda/
    pattern: str  # every match is replaced
    replacement: str
    says: str  # in the failure's text
    case: Case = field(default_factory=lambda: VECTORS)
    where: dict[str, Any] = field(default_factory=lambda: BLOCK)
    epilogue: emulated.Epilogue | None = None


WAIT = r"cp\.async\.wait_group\s+0;"
BARRIER = r"bar\.sync\s+0;"
FENCE = r"membar\.gl;"
CLUSTER_BARRIER = r"barrier\.cluster\.(arrive|wait)[a-z.]*;"
COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+)\]"
DISTANCE = r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
BATCH = r"(setp\.lt\.s32\s+%p\d+, %r\d+), 4;"  # fewer vectors left than a batch has
PAIR = r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%f\d+), (%f\d+);"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+[^;]+), (%r\d+|-1);"

MUTANTS = {
    "forward: no wait for copies": Mutant("resident_forward", WAIT, "", "async: "),
    "backward: no wait for copies": Mutant("resident_backward", WAIT, "", "async: "),
    "forward: no barriers": Mutant("resident_forward", BARRIER, "", "race: "),
    "backward: no barriers": Mutant("resident_backward", BARRIER, "", "race: "),
    "two passes: no barriers": Mutant("two_pass_forward", BARRIER, "", "race: ", where=MANY),
    "two passes, backward: no barriers": Mutant(
        "two_pass_backward", BARRIER, "", "race: ", where=MANY
    ),
    "copies to the neighbour": Mutant("resident_forward", COPY, r"\1+16]", ""),
    "half of each 16-bit value stored": Mutant(
        "two_pass_forward",
        r"st\.global((?:\.cs)?)\.u16",
        r"st.global\1.u8",
        "unwritten: ",
        made((3, 5, 7, 3), torch.bfloat16, "contiguous"),
        {"path": "two_pass"},
    ),
    "forward: no fence": Mutant("two_pass_forward", FENCE, "", "race: ", where=MANY),
    "backward: no fence": Mutant("two_pass_backward", FENCE, "", "race: ", where=MANY),
    "forward, grid: no fence": Mutant("resident_forward", FENCE, "", "race: ", TEAMS, GRID),
    "backward, grid: no fence": Mutant("resident_backward", FENCE, "", "race: ", TEAMS, GRID),
    "forward, cluster: no barrier": Mutant(
        "resident_forward", CLUSTER_BARRIER, "", "", TEAMS, CLUSTER
    ),
    "backward, cluster: no barrier": Mutant(
        "resident_backward", CLUSTER_BARRIER, "", "", TEAMS, CLUSTER
    ),
    "cluster: the first block's sums for all": Mutant(
        "resident_forward",
        r"(mapa\.u64\s+%rd\d+, %rd\d+), %r\d+;",
        r"\1, 0;",
        "y: ",
        TEAMS,
        CLUSTER,
    ),
    "shuffles of half a warp's mask": Mutant(
        "two_pass_forward", SHUFFLE, r"\1, 65535;", "warp: ", where=MANY
    ),
    "shuffles from the neighbour alone": Mutant(
        "two_pass_forward", DISTANCE, r"\1, 1,", "", SMALL, {"path": "two_pass"}
    ),
    "semaphore that does not wrap": Mutant(
        "two_pass_forward", r"atom\.global\.inc\.u32", "atom.global.add.u32", "", where=MANY
    ),
    "no barrier in the vote": Mutant(
        "two_pass_forward",
        r"bar\.red\.or\.pred\s+(%p\d+), 0, (%p\d+);",
        r"mov.pred \1, \2;",
        "",
        where=MANY,
    ),
    "sums that subtract": Mutant(
        "two_pass_backward", r"add\.rn\.f64", "sub.rn.f64", "", SMALL, {"path": "two_pass"}
    ),
    "bfloat16 cut off": Mutant(
        "two_pass_forward",
        PAIR,
        r"{ .reg .b16 %cut<2>; mov.b32 {_, %cut0}, \3; mov.b32 {_, %cut1}, \2; "
        r"mov.b32 \1, {%cut0, %cut1}; }",
        "y: ",
        PAIRS,
        {"path": "two_pass"},
    ),
    "halves of a word exchanged": Mutant(
        "two_pass_forward",
        PAIR,
        r"cvt.rn.bf16x2.f32 \1, \3, \2;",
        "y: ",
        PAIRS,
        {"path": "two_pass"},
    ),
    "a full batch of one lane for all": Mutant(
        "two_pass_forward",
        r"vote\.sync\.all\.pred",
        "vote.sync.any.pred",
        "outside: ",
        MASKED,
        {"path": "two_pass"},
        MASK,
    ),
    "vectors stored to the neighbour": Mutant(
        "resident_forward", r"(st\.global[.a-z]*\.v4\.\w32\s+\[%rd\d+)\]", r"\1+16]", "unwritten: "
    ),
    "vectors read 4 bytes further": Mutant(
        "resident_backward",
        r"(ld\.shared\.v4\.\w32\s+{[^}]+}, \[%r\d+)\]",
        r"\1+4]",
        "misaligned: ",
    ),
    "one value too many": Mutant(
        "two_pass_forward", BATCH, r"\1, 3;", "outside: ", ODD_BATCHES, {"path": "two_pass"}
    ),
}


@pytest.fixture(scope="module")
def files() -> dict[tuple[str, int], Path]:
    return ptx.compile_all(ptx.SOURCES, [80, 90])


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    """The engine of the other tests again."""
    yield
    emulated.library().runner_ptx(b"")
    emulated.use_ptx(emulated.library())


def run_with(folder: Path, mutant: Mutant) -> None:
    wrong = emulated.library().runner_ptx(str(folder).encode())
    assert not wrong
    if mutant.epilogue is None:
        assert_promise(mutant.case, ours=emulated.run(mutant.case, **mutant.where))
        return
    c, e = mutant.case, mutant.epilogue
    assert_right(c, e, emulated.run(c, e, **mutant.where))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(files: dict[tuple[str, int], Path], name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    changed = dict(files)
    arch = 90 if mutant.where.get("device") == "sm_90" else 80
    original = files[mutant.source, arch]
    text, places = re.subn(mutant.pattern, mutant.replacement, original.read_text())
    assert places > 0, "the edit matches nothing"
    changed[mutant.source, arch] = tmp_path / "mutant.ptx"
    changed[mutant.source, arch].write_text(text)
    with pytest.raises((AssertionError, RuntimeError)) as failure:
        run_with(ptx.folder_of("mutant", changed), mutant)
    assert "ptx: " not in str(failure.value)  # the edit is PTX
    assert mutant.says in str(failure.value)


def test_unbroken_code_passes(files: dict[tuple[str, int], Path]) -> None:
    """Without which the mutants would prove nothing."""
    folder = ptx.folder_of("unbroken", files)
    for mutant in MUTANTS.values():
        run_with(folder, mutant)
