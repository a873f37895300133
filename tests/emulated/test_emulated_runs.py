"""Threads of the kernels that keep a tensor on chip, with more values than a run has
(csrc/cuda/moments.cuh): only single values are so many. Run by the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import emulated
from tests.common.cases import assert_promise
from tests.common.emulated_cases import made, same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_several_runs_on_chip(dtype: torch.dtype) -> None:
    """75 or 76 values of each thread, where a run has 64."""
    c = made((67, 3, 17, 17), dtype, "contiguous")
    where: dict[str, Any] = {"path": "block", "multiprocessors": 3}
    launches: list[str] = []
    first = emulated.run(c, launches=launches.append, **where)
    assert ["resident" in line for line in launches] == [True, True]
    assert [int(line.rsplit(" ", 4)[1]) for line in launches] == [3, 3]
    assert_promise(c, ours=first)
    assert same_bits(emulated.run(c, seed=1, **where), first)


def test_first_values_far_from_the_rest_on_chip() -> None:
    """The first batch of every thread is far from its 31 other ones: only in the run that it begins
    do squares of deviations from it lose bits."""
    first, batches = 256 * 4, 32
    x = torch.zeros(1, 3, first * batches + 1)  # one more, so that there are no vectors
    x[..., :first] = 1.7
    with emulated.session(path="block") as s:
        _, _, rstd, _ = s.call(
            *("batch_norm_training", s.copy(x), None, None, None, None, None, None, 0.1, 1e-5),
            *("identity", 0.0, False),
        )
        found = rstd.double()
    assert ["resident" in line for line in s.launches] == [True]
    right = (x.double().var((0, 2), unbiased=False) + 1e-5).rsqrt()
    # 16 batches of a run: 16 additions of squares, of which a sixteenth remains; half for the root.
    assert ((found / right - 1).abs() < 16 * 16 / 2 * 2**-24).all()
