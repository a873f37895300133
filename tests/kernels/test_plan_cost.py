"""csrc/cuda/cost.h: the planner takes what it predicts to be fastest, and predicts what a hand
calculation does."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kernels.test_plan import ROOT, check_plans


def test_the_plan_is_what_the_cost_says(tmp_path: Path) -> None:
    """Never slower than two passes; no faster for a tensor twice as large on the same path."""
    csrc = Path(os.environ.get("BNORM_EXT_CSRC", ROOT / "csrc"))
    done = check_plans(csrc, tmp_path, "check_cost")
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 100000
