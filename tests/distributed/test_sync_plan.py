"""More than one rank: CUDA plans avoid cooperative grids, and `explain` says so."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import bnorm_ext
from bnorm_ext import _cuda, _ops
from tests.common.ranks import ranks

# On an A100, more than a block's shared memory: a cooperative grid.
LARGE: dict[str, Any] = {"input": (64, 64, 56, 56), "dtype": torch.bfloat16, "device": "A100"}
REASON = (
    "two passes, 2 reads + 1 write: a cooperative grid and the collectives of other processes "
    "would wait for each other"
)


def test_explain() -> None:
    alone = bnorm_ext.explain(**LARGE)
    assert alone == bnorm_ext.explain(**LARGE, processes=1)
    assert "in a cooperative grid" in alone
    several = bnorm_ext.explain(**LARGE, processes=8)
    assert f"forward: {REASON}" in several
    # Blocks and clusters wait for nobody.
    for device in ("A100", "H100"):
        small = {"input": (64, 64, 8, 8), "device": device}
        assert bnorm_ext.explain(**small, processes=8) == bnorm_ext.explain(**small)


class Told:
    """In place of the compiled module: what it is told."""

    def __init__(self) -> None:
        self.values: list[bool] = []

    def set_beside_collectives(self, value: bool) -> None:
        self.values.append(value)


def noticed(rank: int) -> tuple[list[bool], str]:
    _cuda._compiled = told = Told()
    for _ in range(3):
        _cuda.notice_processes()
    return told.values, bnorm_ext.explain(**LARGE)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_two_ranks_are_noticed(tmp_path) -> None:
    with ranks(2, tmp_path) as started:
        for told, text in started(noticed):
            assert told == [True]
            assert f"forward: {REASON}" in text


class Group:
    """In place of a process group."""


def test_a_group_comes_and_goes(monkeypatch) -> None:
    """Said only when something has changed; a group that has ended is not kept alive."""
    told, here = Told(), SimpleNamespace(WORLD=None)
    ranks_now = 1
    monkeypatch.setattr(_cuda, "_compiled", told)
    monkeypatch.setattr(_cuda, "_seen", _cuda._nobody)
    monkeypatch.setattr(
        _cuda,
        "dist",
        SimpleNamespace(
            group=here,
            is_initialized=lambda: here.WORLD is not None,
            get_world_size=lambda: ranks_now,
        ),
    )
    _cuda.notice_processes()
    assert told.values == []
    here.WORLD, ranks_now = Group(), 2
    alive = weakref.ref(here.WORLD)
    _cuda.notice_processes()
    _cuda.notice_processes()
    assert told.values == [True]
    here.WORLD = None
    gc.collect()
    assert alive() is None
    _cuda.notice_processes()
    here.WORLD, ranks_now = Group(), 1
    _cuda.notice_processes()
    assert told.values[-1] is False


def without_code(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A synchronised layer where the CPU is asked like a GPU, and there is no code for it."""
    from bnorm_ext.distributed import composite, module

    taken = []
    step = composite.training_step
    x = torch.arange(16.0).reshape(2, 2, 2, 2) + 7 * rank
    layer = bnorm_ext.SyncBatchNorm(2)
    expected = layer(x).detach()
    module.ASKED_DEVICES, module.has_code = frozenset({"cpu"}), lambda input: False
    composite.training_step = lambda *a: taken.append(1) or step(*a)
    found = layer(x).detach()
    assert taken == [1]
    return found, expected


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_synchronised_without_code(tmp_path) -> None:
    """Torch's own operations share the statistics then."""
    with ranks(2, tmp_path) as started:
        for found, expected in started(without_code):
            torch.testing.assert_close(found, expected)


def test_compiling_notices(monkeypatch) -> None:
    """A graph calls the operators without this package's Python."""
    looked = []
    monkeypatch.setattr(_ops, "ASKED_DEVICES", frozenset({"cuda"}))
    monkeypatch.setattr(_ops, "notice_processes", lambda: looked.append(1))
    with FakeTensorMode():
        x = torch.empty((4, 3, 2, 2), device="cuda")
        torch.ops.bnorm_ext.batch_norm_stats(x)
    assert looked == [1]
