"""The smallest net that fuses, for tests that change one thing about its forward."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def images(dtype=torch.float32):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def reasons(report):
    return "; ".join(reason for _, reason in report.not_traced)
