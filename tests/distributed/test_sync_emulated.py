"""SyncBatchNorm's CUDA operators, run by the emulator in each process, between Gloo processes: the
numbers of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bnorm_ext
from bnorm_ext.distributed import collectives, function, statistics
from tests.common import emulated
from tests.common.ranks import ranks
from tests.common.sync_cases import C, Case, assert_equal, expected, parameters, whole

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

WORLD = 2
CALLED = {
    "batch_norm_stats",
    "batch_norm_merge_stats",
    "batch_norm_apply",
    "batch_norm_backward_reduce",
    "batch_norm_backward_apply",
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    built = emulated.built()  # here, so that the processes find it
    if isinstance(built, Exception):
        raise built
    with ranks(WORLD, tmp_path_factory.mktemp("ranks")) as started:
        yield started


class Operators:
    """In place of ``torch.ops.bnorm_ext``: the CUDA operators, on CPU tensors of the session."""

    def __init__(self, session: emulated.Session) -> None:
        self.session, self.called = session, set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.called.add(name)
            return self.session.call(name, *arguments)

        return call


def split(rank: int, case: Case) -> dict[str, Any]:
    layer = parameters(bnorm_ext.SyncBatchNorm(C, act=case.act, **case.options), case.dtype)
    start = sum(case.sizes[:rank])
    part = slice(start, start + case.sizes[rank])
    x, residual, dy = (t[part].clone() for t in whole(case, WORLD)[0])
    # What is agreed on at the first call is no operator's business.
    layer(x)
    layer.reset_running_stats()
    kept = statistics._ops, collectives.GATHER_BYTES
    try:
        with emulated.session(seed=rank) as session:
            statistics._ops = function._ops = operators = Operators(session)
            collectives.GATHER_BYTES = 0 if case.summed else kept[1]
            x, residual, dy = (session.copy(t) for t in (x, residual, dy))
            # The kernels may read nothing else.
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(session.copy(p)))
            for name, b in list(layer.named_buffers()):
                setattr(layer, name, session.copy(b, inout=True))
            x.requires_grad_(), residual.requires_grad_()
            y = layer(x, residual) if case.residual else layer(x)
            y.backward(dy)
            found = {"y0": y.detach(), "dx0": x.grad}
            found |= {"dresidual0": residual.grad} if case.residual else {}
            found |= {f"d{name}0": p.grad for name, p in layer.named_parameters()}
            found |= dict(layer.named_buffers())
    finally:
        statistics._ops = function._ops = kept[0]
        collectives.GATHER_BYTES = kept[1]
    assert operators.called == CALLED
    assert session.launches
    return {name: t.clone() for name, t in found.items()}


CASES = {
    "float64": Case(),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "channels_last": Case(channels_last=True),
    "uneven": Case(sizes=(1, 6)),
    "relu, residual": Case(act="relu", residual=True),
    "silu, residual": Case(act="silu", residual=True),
    "summed": Case(summed=True),
    "mean 1e5": Case(mean=1e5),
}


@pytest.mark.parametrize("name", CASES)
def test_split_batch_equals_whole(group: Any, name: str) -> None:
    case = CASES[name]
    assert_equal(group(split, case), expected(case, WORLD), case)
