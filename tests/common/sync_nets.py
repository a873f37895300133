"""A small net and its training, by one process or by a share of the batch in each of two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(144, 2)
    ).double()


def images(step: int, samples: slice = slice(None)) -> torch.Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=rng)[samples]


def share(rank: int) -> slice:
    return slice(3 * rank, 3 * rank + 3)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return F.softplus(y).square().mean()


def train(net: nn.Module, samples: slice = slice(None), steps: int = STEPS) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net(images(step, samples))).backward()
        optimizer.step()
    inner = getattr(net, "module", net)
    return {n: t.clone() for n, t in inner.state_dict().items()}
