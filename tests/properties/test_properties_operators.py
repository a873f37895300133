"""Thousands of direct calls of torch.ops.bnorm_ext.* with arguments that fit or do not: an
exception for each that does not, which has changed nothing, and right results for the others. In a
process of its own, so that a crash is told with the call that made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.common.operator_calls import Maker, text_of

ROOT = Path(__file__).parents[2]
#: Calls for each of four processes: 2,000 in all as a rule, 10,000 with 20,000 examples.
CALLS = max(500, settings.default.max_examples // 8)


@pytest.mark.parametrize("part", range(4))
def test_calls(part):
    program = [sys.executable, "-m", "tests.common.operator_program", "0", str(part * CALLS)]
    done = subprocess.run(
        [*program, str(CALLS)], capture_output=True, text=True, timeout=1800, cwd=ROOT, check=False
    )
    wrong = [line for line in done.stdout.splitlines() if not line.isdigit()]
    if done.returncode not in (0, 100) and not wrong:
        numbers = [line for line in done.stdout.splitlines() if line.isdigit()]
        maker = Maker(0, int(numbers[-1])) if numbers else None
        call = "no call" if maker is None else text_of(maker, maker.spoiled())
        pytest.fail(f"ended with {done.returncode} in {call}\n{done.stderr[-3000:]}")
    assert not wrong, "\n".join(wrong[:40])
