"""What goes wrong in one process is an error in all, soon, that says what it is."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bnorm_ext
from tests.common.ranks import RankFailed, Ranks, ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

TIMEOUT_S = 5


@pytest.fixture
def group(tmp_path):
    with ranks(2, tmp_path) as started:
        yield started


@pytest.fixture
def impatient(tmp_path):
    """For what has to end soon, with no time for the start. Nothing else: on a busy machine a rank
    that compiles may take longer."""
    with ranks(2, tmp_path, TIMEOUT_S) as started:
        started(forward, [(2, 4, 3, 3)] * 2, [torch.float32] * 2)  # from here on both run
        yield started


def forward(rank: int, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> None:
    net = nn.ModuleDict({"stem": bnorm_ext.BatchNorm2d(shapes[rank][1], device="cpu")})
    bnorm_ext.convert_batchnorm(net, sync=True)
    net["stem"](torch.randn(shapes[rank]).to(dtypes[rank]))


def test_other_channels(group: Ranks) -> None:
    shapes = [(2, 64, 3, 3), (4, 32, 3, 3)]
    for failure in group.failures(forward, shapes, [torch.float32] * 2):
        assert failure.name == "RuntimeError"
        assert "layer stem" in failure.text
        assert "rank 0 has an input of shape (2, 64, 3, 3) and torch.float32" in failure.text
        assert "rank 1 has an input of shape (4, 32, 3, 3) and torch.float32" in failure.text


def test_other_dtype(group: Ranks) -> None:
    dtypes = [torch.float32, torch.bfloat16]
    for failure in group.failures(forward, [(2, 4, 3, 3)] * 2, dtypes):
        assert failure.name == "RuntimeError"
        assert "torch.bfloat16" in failure.text
        assert "torch.float32" in failure.text


def other_order(rank: int) -> None:
    """Both have as many channels; one rank's forward takes them the other way round."""
    net = nn.ModuleDict({name: bnorm_ext.BatchNorm2d(4) for name in ("a", "b")})
    bnorm_ext.convert_batchnorm(net, sync=True)
    for name in ("ab", "ba")[rank]:
        net[name](torch.randn(2, 4, 3, 3))


def test_other_layer(group: Ranks) -> None:
    for failure in group.failures(other_order):
        assert failure.name == "RuntimeError"
        assert "do not normalise the same layer" in failure.text


def other_channels_compiled(rank: int) -> None:
    net = bnorm_ext.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4 + rank)), sync=True)
    torch.compile(net, backend="aot_eager", fullgraph=True)(torch.randn(2, 4 + rank, 3, 3))


def test_other_channels_compiled(group: Ranks) -> None:
    for failure in group.failures(other_channels_compiled):
        assert "layer 0, rank 0 has an input of shape (2, 4, 3, 3)" in failure.text


def one_rank_leaves_compiled_code(rank: int) -> torch.Tensor:
    """Eager and compiled calls of one layer meet."""
    torch._dynamo.reset()
    bn = bnorm_ext.SyncBatchNorm(4)
    call = torch.compile(bn, backend="aot_eager", fullgraph=True) if rank else bn
    for _ in range(2):
        call(torch.full((2, 4, 3, 3), float(rank)))
    return bn.running_mean


def test_eager_and_compiled_calls_meet(group: Ranks) -> None:
    first, second = group(one_rank_leaves_compiled_code)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.full((4,), 0.095))  # 0.5 with momentum 0.1, twice


def wrong_call(rank: int, what: str) -> None:
    bn = bnorm_ext.SyncBatchNorm(4, act="relu")
    x = torch.randn(2, 4, 3, 3)
    if what == "weight":
        bn.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    elif what == "act":
        bn.act = "gelu"
    elif what == "running_var":
        bn.running_var = torch.ones(3)
    try:
        bn(x, torch.randn(1)) if what == "residual" else bn(x)
    finally:
        assert bn.num_batches_tracked == 0
        assert not bn.running_mean.any()


@pytest.mark.parametrize("what", ["weight", "act", "running_var", "residual"])
def test_a_call_that_raises_has_changed_nothing(group: Ranks, what: str) -> None:
    for failure in group.failures(wrong_call, what):
        assert failure.name in ("RuntimeError", "ValueError")


def test_other_sizes_are_none(group: Ranks) -> None:
    group(forward, [(2, 4, 3, 3), (5, 4, 1, 7)], [torch.float32] * 2)


def changes_dtype_later(rank: int) -> None:
    """Both have agreed on float32; then one of them changes."""
    bn = bnorm_ext.SyncBatchNorm(4)
    bn(torch.randn(2, 4, 3, 3))
    bn(torch.randn(2, 4, 3, 3).to([torch.float32, torch.bfloat16][rank]))


def test_a_later_change_is_an_error_too(impatient: Ranks) -> None:
    started = time.monotonic()
    impatient.send(changes_dtype_later)
    for rank in range(2):
        with pytest.raises(RankFailed):
            impatient.answer(rank, 4 * TIMEOUT_S)
    assert time.monotonic() - started < 4 * TIMEOUT_S


def one_value(rank: int, sizes: list[int]) -> list[torch.Tensor]:
    bn = bnorm_ext.SyncBatchNorm(4)
    before = [t.clone() for t in (bn.running_mean, bn.running_var)]
    x = torch.randn(sizes[rank], 4, requires_grad=True)
    try:
        y = bn(x)
    finally:
        assert torch.equal(bn.running_mean, before[0])
        assert torch.equal(bn.running_var, before[1])
    y.sum().backward()
    assert x.grad.shape == y.shape == x.shape
    return []


@pytest.mark.parametrize("sizes", [[1, 0], [0, 1]])
def test_one_value_over_all_ranks(group: Ranks, sizes: list[int]) -> None:
    for failure in group.failures(one_value, sizes):
        assert failure.name == "ValueError"
        assert "Expected more than 1 value per channel when training" in failure.text


def test_no_value_over_all_ranks(group: Ranks) -> None:
    group(one_value, [0, 0])


def one_value_each(rank: int) -> torch.Tensor:
    return bnorm_ext.SyncBatchNorm(1, affine=False)(torch.tensor([[float(rank)]]))


def test_one_value_each_is_enough(group: Ranks) -> None:
    first, second = group(one_value_each)
    torch.testing.assert_close(
        torch.cat([first, second]), torch.tensor([[-1.0], [1.0]]), rtol=1e-4, atol=0
    )


def dies(rank: int) -> None:
    bn = bnorm_ext.SyncBatchNorm(4)
    bn(torch.randn(2, 4, 3, 3))
    if rank == 1:
        os._exit(3)
    bn(torch.randn(2, 4, 3, 3))


def test_a_rank_that_dies(impatient: Ranks) -> None:
    impatient.send(dies)
    with pytest.raises(RankFailed) as dead:
        impatient.answer(1, 4 * TIMEOUT_S)
    assert dead.value.text == "code 3"
    with pytest.raises(RankFailed) as alone:
        impatient.answer(0, 4 * TIMEOUT_S)
    assert alone.value.name in ("RuntimeError", "DistBackendError", "DistNetworkError")


def late(rank: int) -> None:
    bn = bnorm_ext.SyncBatchNorm(4)
    bn(torch.randn(2, 4, 3, 3))
    if rank == 1:
        time.sleep(2 * TIMEOUT_S)
    bn(torch.randn(2, 4, 3, 3))


def test_a_rank_that_comes_too_late(impatient: Ranks) -> None:
    impatient.send(late)
    with pytest.raises(RankFailed) as waited:
        impatient.answer(0, 4 * TIMEOUT_S)
    assert waited.value.name in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert "imed out" in waited.value.text or "imeout" in waited.value.text
