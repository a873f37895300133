"""SyncBatchNorm in what nets are trained with: DDP, FSDP, compile, checkpointing, subgroups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import bnorm_ext
from tests.common.ranks import Ranks, ranks
from tests.common.sync_nets import images, loss_of, make, share, train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

WORLD = 2
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with ranks(WORLD, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def alone() -> dict[str, Any]:
    return train(make())


def assert_as_alone(states: list[dict[str, Any]]) -> None:
    for state in states:
        torch.testing.assert_close(state, alone(), **TIGHT)


def synchronised(fused: bool) -> nn.Module:
    net = bnorm_ext.convert_batchnorm(make(), sync=True)
    if not fused:
        return net
    net, report = bnorm_ext.fuse_batchnorm_act(net)
    assert [name for name, *_ in report.fused] == ["1", "3.bn1", "3.bn2"]
    assert all(isinstance(net.get_submodule(n), bnorm_ext.SyncBatchNorm) for n, *_ in report.fused)
    return net


def ddp(rank: int, fused: bool, options: dict[str, Any]) -> dict[str, Any]:
    return train(DDP(synchronised(fused), **options), share(rank))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"broadcast_buffers": False}, {"static_graph": True}], ids=str
)
def test_ddp_equals_one_process(group: Ranks, fused: bool, options: dict[str, Any]) -> None:
    assert_as_alone(group(ddp, fused, options))


def fully_sharded(rank: int, fused: bool, per_block: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    net = synchronised(fused)
    if per_block:
        fully_shard(net[3], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in train(net, share(rank)).items()
    }


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_fully_shard_equals_one_process(group: Ranks, fused: bool, per_block: bool) -> None:
    assert_as_alone(group(fully_sharded, fused, per_block))


def flat_parameters(rank: int, fused: bool) -> dict[str, Any]:
    net = FullyShardedDataParallel(synchronised(fused), use_orig_params=True, device_id="cpu")
    train(net, share(rank))
    with FullyShardedDataParallel.summon_full_params(net):
        return {n: t.clone() for n, t in net.module.state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("fused", [False, True])
def test_fsdp_equals_one_process(group: Ranks, fused: bool) -> None:
    assert_as_alone(group(flat_parameters, fused))


def accumulated(rank: int) -> dict[str, Any]:
    """Two batches a step, gradients exchanged with the second."""
    net = DDP(synchronised(True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with net.no_sync():
        loss_of(net(images(0, share(rank)))).backward()
    loss_of(net(images(1, share(rank)))).backward()
    optimizer.step()
    return {n: t.clone() for n, t in net.module.state_dict().items()}


def test_gradient_accumulation(group: Ranks) -> None:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        loss_of(net(images(step))).backward()
    optimizer.step()
    for state in group(accumulated):
        torch.testing.assert_close(state, dict(net.state_dict()), **TIGHT)


def two_forwards(rank: int) -> Any:
    net = synchronised(True)
    first, second = net(images(0, share(rank))), net(images(1, share(rank)))
    (loss_of(first) + loss_of(second)).backward()
    return [p.grad for p in net.parameters()]


def test_two_forwards_before_one_backward(group: Ranks) -> None:
    net = make()
    (loss_of(net(images(0))) + loss_of(net(images(1)))).backward()
    found = [sum(g) / WORLD for g in zip(*group(two_forwards), strict=True)]
    torch.testing.assert_close(found, [p.grad for p in net.parameters()], **TIGHT)


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def checkpointed(rank: int, reentrant: bool) -> Any:
    net = Checkpointed(synchronised(False), reentrant)
    x = images(0, share(rank)).requires_grad_()
    loss_of(net(x)).backward()
    return x.grad, {n: t.clone() for n, t in net.net.state_dict().items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(group: Ranks, reentrant: bool) -> None:
    """The collectives run again, and the statistics move twice, as in one process."""
    net = Checkpointed(make(), reentrant)
    x = images(0).requires_grad_()
    loss_of(net(x)).backward()
    results = group(checkpointed, reentrant)
    torch.testing.assert_close(torch.cat([dx for dx, _ in results]) / WORLD, x.grad, **TIGHT)
    for _, state in results:
        torch.testing.assert_close(state, dict(net.net.state_dict()), **TIGHT)


def amp(rank: int) -> dict[str, Any]:
    net = synchronised(True).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images(0, share(rank)).float())
    y.float().square().mean().backward()
    return {n: t.clone() for n, t in net.state_dict().items()} | {
        f"d{n}": p.grad for n, p in net.named_parameters()
    }


def test_autocast(group: Ranks) -> None:
    found = group(amp)
    net = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images(0).float())
    y.float().square().mean().backward()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[0][name], value, rtol=2e-2, atol=2e-2)
        assert torch.equal(found[0][name], found[1][name])
    # One scale for all: the gradient of a bias before a batch norm is 0, and noise in bfloat16.
    scale = max(p.grad.abs().max() for p in net.parameters())
    for name, p in net.named_parameters():
        mean = (found[0][f"d{name}"] + found[1][f"d{name}"]) / 2
        torch.testing.assert_close(mean / scale, p.grad / scale, rtol=0, atol=6e-2)


def in_pairs(rank: int) -> dict[str, Any]:
    """Four ranks, each two of them with statistics of their own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = bnorm_ext.convert_batchnorm(make(), sync=True, process_group=pairs[rank // 2])
    copied = copy.deepcopy(net)
    assert copied[1].process_group is pairs[rank // 2]
    net(images(rank // 2, share(rank % 2)))
    copied(images(rank // 2, share(rank % 2)))
    torch.testing.assert_close(dict(net.state_dict()), dict(copied.state_dict()), rtol=0, atol=0)
    return dict(net.state_dict())


def test_process_groups_of_a_part_of_the_ranks(tmp_path) -> None:
    with ranks(4, tmp_path) as four:
        found = four(in_pairs)
    for pair in range(2):
        net = make()
        net(images(pair))
        for state in found[2 * pair : 2 * pair + 2]:
            torch.testing.assert_close(state, dict(net.state_dict()), **TIGHT)


def outside_of_the_group(rank: int) -> Any:
    group = dist.new_group([0])
    net = bnorm_ext.SyncBatchNorm(3, process_group=group)
    x = images(rank).float()
    return net(x), bnorm_ext.BatchNorm2d(3)(x)


def test_a_rank_outside_of_the_group_shares_nothing(tmp_path) -> None:
    """As in nn.SyncBatchNorm, whose world size is then -1."""
    with ranks(2, tmp_path) as two:
        for shared, alone in two(outside_of_the_group):
            assert torch.equal(shared, alone)


def second_order(rank: int, act: str, residual: bool) -> Any:
    torch.manual_seed(0)
    bn = bnorm_ext.SyncBatchNorm(3, act=act).double()
    x, r, v = (t[share(rank)].clone().requires_grad_() for t in tensors())
    y = bn(x, r) if residual else bn(x)
    asked = [x, *([r] if residual else []), bn.weight, bn.bias]
    grads = torch.autograd.grad((y * v).square().sum(), asked, create_graph=True)
    penalty = sum(g.square().sum() for g in grads[: 1 + residual])
    penalty.backward()
    return [x.grad, r.grad if residual else None, v.grad]


def tensors() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=rng) for _ in range(3)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu", "silu"])
def test_second_derivatives(group: Ranks, act: str, residual: bool) -> None:
    """A gradient penalty, summed over the ranks."""
    bn = nn.BatchNorm2d(3).double()
    x, r, v = (t.clone().requires_grad_() for t in tensors())
    z = bn(x) + r if residual else bn(x)
    y = z if act == "identity" else getattr(F, act)(z)
    (y * v).square().sum()
    asked = [x, *([r] if residual else [])]
    grads = torch.autograd.grad((y * v).square().sum(), asked, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    found = group(second_order, act, residual)
    for i, t in enumerate((x, r, v)):
        if i != 1 or residual:
            parts = torch.cat([part[i] for part in found])
            torch.testing.assert_close(parts, t.grad, **TIGHT)


def input_is_residual(rank: int, act: str) -> Any:
    bn = bnorm_ext.SyncBatchNorm(3, act=act).double()
    x = tensors()[0][share(rank)].requires_grad_()
    (dx,) = torch.autograd.grad(bn(x, x).square().sum(), x, create_graph=True)
    return dx.detach()


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish"])
def test_input_that_is_the_residual_too(group: Ranks, act: str) -> None:
    x = tensors()[0].requires_grad_()
    y = getattr(F, act)(nn.BatchNorm2d(3).double()(x) + x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(torch.cat(group(input_is_residual, act)), dx, **TIGHT)


def second_order_with_an_empty_rank(rank: int, act: str) -> Any:
    bn = bnorm_ext.SyncBatchNorm(3, act=act).double()
    x, r, _ = (t[: 6 * (1 - rank)].clone().requires_grad_() for t in tensors())
    (dx,) = torch.autograd.grad(bn(x, r).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_second_derivatives_with_an_empty_rank(group: Ranks, act: str) -> None:
    x, r, _ = (t.clone().requires_grad_() for t in tensors())
    y = getattr(F, act)(nn.BatchNorm2d(3).double()(x) + r)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    found, empty = group(second_order_with_an_empty_rank, act)
    torch.testing.assert_close(found, x.grad, **TIGHT)
    assert empty.shape == (0, 3, 4, 4)


def one_value_compiled(rank: int) -> torch.Tensor:
    """One image a rank, pooled to one value per channel: no break in the graph."""
    torch._dynamo.reset()
    bn = torch.compile(bnorm_ext.SyncBatchNorm(3).double(), backend="aot_eager", fullgraph=True)
    return bn(tensors()[0][rank : rank + 1].mean((2, 3), keepdim=True)).detach()


def test_one_value_on_each_rank_compiles(group: Ranks) -> None:
    x = tensors()[0][:2].mean((2, 3), keepdim=True)
    y = nn.BatchNorm2d(3).double()(x)
    torch.testing.assert_close(torch.cat(group(one_value_compiled)), y.detach(), **TIGHT)


def without_kernels(rank: int) -> Any:
    """Where there are no kernels for a device, torch's own operations do it."""
    from bnorm_ext.distributed import module

    known = module.KERNEL_DEVICES
    try:
        module.KERNEL_DEVICES = frozenset()
        return train(DDP(synchronised(True)), share(rank))
    finally:
        module.KERNEL_DEVICES = known


def test_without_kernels(group: Ranks) -> None:
    assert_as_alone(group(without_kernels))


def compiled(rank: int, fused: bool, dynamic: bool) -> Any:
    torch._dynamo.reset()
    net = torch.compile(synchronised(fused), fullgraph=True, dynamic=dynamic)
    state = train(DDP(net, broadcast_buffers=False), share(rank))
    return {n.removeprefix("_orig_mod."): t for n, t in state.items()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled(group: Ranks, fused: bool, dynamic: bool) -> None:
    assert_as_alone(group(compiled, fused, dynamic))
