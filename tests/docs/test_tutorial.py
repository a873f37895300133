"""The Python blocks of the documents are run, and what they print is what the documents say."""

from __future__ import annotations

import contextlib
import doctest
import io
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str
    line: int  # of its first line of text


def blocks(path: Path) -> list[Block]:
    found, lines = [], path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            text = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(lines[start][3:].strip(), text, start + 2))
            start = None
    assert start is None, f"{path.name}:{start}: a fence is not closed"
    return found


def run(block: Block, path: Path, names: dict[str, Any]) -> str:
    """What the block prints. Its traceback names the line of the document."""
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def unit_of_last_digit(number: str) -> float:
    """0.001 for 1.234, 1 for 12."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def differences(printed: str, expected: str) -> list[str]:
    """Words have to be equal, numbers within one unit of the last digit; spaces do not matter."""
    if re.sub(r"\s+", "", NUMBER.sub("#", printed)) != re.sub(
        r"\s+", "", NUMBER.sub("#", expected)
    ):
        return [f"printed:\n{printed}\nexpected:\n{expected}"]
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True)
    return [
        f"{got} is printed where {wanted} is expected"
        for got, wanted in pairs
        if abs(float(got.replace(",", "")) - float(wanted.replace(",", "")))
        > 1.01 * unit_of_last_digit(wanted)
    ]


def test_differences():
    """The comparison itself sees what it should."""
    assert not differences("tensor([-0.0000, 1.23])", "tensor([0.0000,  1.24])\n")
    assert not differences("1,000 us", "1,001 us")
    assert differences("tensor([0.1000])", "tensor([0.1002])")
    assert differences("True", "False")
    assert differences("[1., 2.]", "[1., 2., 3.]")
    assert differences("", "1.0")


def test_tutorial():
    """In one session from top to bottom, as the page says."""
    path = ROOT / "docs" / "tutorial.md"
    names: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(path)
    code = [i for i, block in enumerate(found) if block.language == "python"]
    assert len(code) > 10
    for i in code:
        printed = run(found[i], path, names)
        follows = found[i + 1] if i + 1 < len(found) else None
        expected = follows.text if follows is not None and follows.language == "text" else ""
        wrong = differences(printed, expected)
        assert not wrong, f"{path.name}:{found[i].line}:\n" + "\n".join(wrong)


def test_every_expected_output_follows_code():
    found = blocks(ROOT / "docs" / "tutorial.md")
    for before, block in itertools.pairwise(found):
        if block.language == "text":
            assert before.language == "python", f"tutorial.md:{block.line}"


def test_readme(capsys):
    """Its blocks in one session, with the reader's model in place."""
    path = ROOT / "README.md"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    names: dict[str, Any] = {"__name__": "__main__", "model": model, "torch": torch}
    code = [block for block in blocks(path) if block.language == "python"]
    assert len(code) >= 5
    for block in code:
        if not block.text.startswith(">>>"):
            run(block, path, names)
            continue
        example = doctest.DocTestParser().get_doctest(
            block.text, names, path.name, str(path), block.line
        )
        result = doctest.DocTestRunner(verbose=False).run(example, clear_globs=False)
        assert result.attempted > 0
        assert result.failed == 0, capsys.readouterr().out
    assert names["report"].fused == [("1", "relu", False)]
    assert type(names["model"][1]).__module__ == "bnorm_ext.modules"


@pytest.mark.parametrize("name", ["performance.md", "numerics.md", "reading.md", "kernels.md"])
def test_no_other_page_has_python_that_nobody_runs(name):
    path = ROOT / "docs" / name
    assert not [block for block in blocks(path) if block.language == "python"]
