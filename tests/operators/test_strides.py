"""Strides of outputs and gradients are native's, also where dimensions of size 1 make several
memory formats of a tensor, or have strides that mean nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext


def random_tensor(sizes: list[int], generator: torch.Generator) -> Tensor:
    """Dense, its dimensions in any order; those of size 1 may have any stride."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    rank = len(sizes)
    order = torch.randperm(rank, generator=generator).tolist()
    if below(2):
        order = [0, *range(2, rank), 1] if below(2) else list(range(rank))
    t = torch.randn([sizes[i] for i in order], generator=generator)
    t = t.permute([order.index(i) for i in range(rank)])
    strides = [
        (1, 3, 7)[below(3)] if size == 1 and below(2) else stride
        for size, stride in zip(sizes, t.stride(), strict=True)
    ]
    return t.as_strided(sizes, strides)


def strides(function, x: Tensor, dy: Tensor, training: bool):
    v = torch.ones(x.shape[1])
    x = x.detach().requires_grad_()
    y = function(x, v.clone(), v.clone(), v, v.clone(), training)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.stride(), dx.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_strides_are_natives(rank, training):
    generator = torch.Generator().manual_seed(rank)
    seen = set()
    for _ in range(600):
        sizes = [1 + int(i) % 4 for i in torch.randint(8, (rank,), generator=generator)]
        x, dy = (random_tensor(sizes, generator) for _ in range(2))
        if x.numel() == x.shape[1]:
            continue
        y, dx = strides(F.batch_norm, x, dy, training)
        found = strides(bnorm_ext.batch_norm, x, dy, training)
        assert found[0] == y, (sizes, x.stride())
        # Native makes a contiguous dx where x is dense in channels_last alone, dy too, but only one
        # of them by the rule of suggest_memory_format; ours stays in the format of x.
        if x.is_contiguous() or dy.is_contiguous():
            assert found[1] == dx, (sizes, x.stride(), dy.stride())
            seen.add(x.is_contiguous())
    assert seen == {True, False} or rank == 3


POINTS = {
    "2d": lambda: torch.randn(2, 5, 3).transpose(1, 2).unsqueeze(-1),
    "2d, one row": lambda: torch.randn(2, 5, 3).transpose(1, 2).unsqueeze(2),
    "3d": lambda: torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2).unsqueeze(-1),
}


# Without an activation, a compiled graph has native's operator.
@pytest.mark.parametrize(("act", "compiled"), [(None, False), ("relu", False), ("relu", True)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("what", POINTS)
def test_points_with_their_features_last(what, training, act, compiled):
    """(N, L, C), as linear layers give it, with a dimension of size 1: no copy is made of it, and
    the result can be viewed as (N * L, C)."""
    x = POINTS[what]().requires_grad_()
    v = torch.ones(3)

    def ours(x):
        return bnorm_ext.batch_norm(x, v.clone(), v.clone(), v, v, training, act=act)

    if compiled:
        torch.compiler.reset()
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    y = ours(x)
    expected = F.batch_norm(x, v.clone(), v.clone(), v, v, training)
    assert y.stride() == expected.stride()
    assert y.flatten(2).transpose(1, 2).view(-1, 3).shape[0] == x.numel() // 3
    (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape))
    assert dx.stride() == torch.autograd.grad(expected, x, torch.randn(x.shape))[0].stride()
