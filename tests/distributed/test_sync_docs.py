"""docs/distributed.md: its table is the formula's, its code runs, its messages are those raised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bnorm_ext
from bnorm_ext.bench import sync, traffic
from bnorm_ext.distributed import agreement, collectives, statistics

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "distributed.md"

pytestmark = [
    pytest.mark.skipif(not DOCS.is_file(), reason="needs the source tree"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def text() -> str:
    return DOCS.read_text()


def test_the_traffic_table_is_the_formulas(text: str) -> None:
    expected = [f"| {' | '.join(line)} |" for line in traffic.lines("resnet50")]
    found = text.partition("<!-- traffic -->\n")[2].partition("\n\n")[0].splitlines()
    assert [found[0], *found[2:]] == expected


def test_numbers_in_the_text(text: str) -> None:
    channels = traffic.channels_of("resnet50")
    assert f"({len(channels)} batch norms, {sum(channels):,} channels)" in text
    assert collectives.GATHER_BYTES == 1 << 20
    assert "at most 1 MiB" in text


def test_code_runs(text: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        namespace: dict[str, object] = {}
        exec(compile(block, str(DOCS), "exec"), namespace)
    norm = namespace["model"].get_submodule("1")
    assert isinstance(norm, bnorm_ext.SyncBatchNorm)
    assert namespace["model"](torch.randn(2, 3, 8, 8)).min() >= 0


def test_commands_are_understood(text: str) -> None:
    commands = re.findall(r"python -m bench\.sync ?(.*?)[`\n]", text)
    assert len(commands) > 1
    for arguments in commands:
        sync.parser("bench.sync").parse_args(arguments.split())


def test_messages_are_those_raised(text: str) -> None:
    sources = "".join(Path(m.__file__).read_text() for m in (agreement, statistics))
    for part in (
        "the ranks of the process group do not normalise the same layer",
        "Expected more than 1 value per channel when training",
    ):
        assert part in text
        assert part in sources
