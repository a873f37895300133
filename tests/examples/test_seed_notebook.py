"""Seed 004, the starter notebook: its printed normalisation, its derivation of the gradient, and
its small classifier, made to run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnorm_ext

GAMMA = torch.tensor([0.2850, 0.7858, 0.2416, 0.6030])
X = torch.arange(12.0).view(3, 4)
SIGNS = torch.tensor([[-1.0], [0.0], [1.0]])


def test_printed_normalisation():
    """gamma is printed with four decimals, so products with it are known to 5e-5 of the factor
    plus 5e-5 of the printed result."""
    module = bnorm_ext.BatchNorm1d(4)
    module.weight = nn.Parameter(GAMMA.clone())
    mean = X.mean(0)
    assert torch.equal(mean, torch.tensor([4.0, 5.0, 6.0, 7.0]))
    unbiased = (X.var(0) + module.eps).sqrt()
    torch.testing.assert_close(unbiased, torch.full((4,), 4.0), rtol=0.0, atol=6e-5)
    torch.testing.assert_close(X - mean, (4 * SIGNS).expand(3, 4), rtol=0.0, atol=1e-6)
    torch.testing.assert_close((X - mean) / unbiased, SIGNS.expand(3, 4), rtol=0.0, atol=6e-5)
    scaled = torch.tensor([1.1401, 3.1434, 0.9663, 2.4119]) * SIGNS
    torch.testing.assert_close((X - mean) * GAMMA, scaled, rtol=0.0, atol=4 * 5e-5 + 6e-5)
    # The module divides by the biased deviation, sqrt(32 / 3), not by the unbiased 4.
    printed = torch.tensor([0.3491, 0.9625, 0.2959, 0.7385]) * SIGNS
    y = module(X)
    torch.testing.assert_close(y.detach(), printed, rtol=0.0, atol=1.2247 * 5e-5 + 6e-5)
    assert (y - SIGNS * GAMMA).abs().max() > 0.1


def test_multiplication_per_column():
    """A row of factors multiplies every row: the affine part of the module alone."""
    module = bnorm_ext.BatchNorm1d(3).eval()
    nn.init.constant_(module.weight, 10.0)
    y = module(torch.tensor([[1.0] * 3, [2.0] * 3]))
    # eps = 1e-5 beside the running variance of 1 takes 5e-6 of the factor.
    torch.testing.assert_close(y, torch.tensor([[10.0] * 3, [20.0] * 3]), rtol=6e-6, atol=0.0)


EPS = 1e-3  # the notebook's
# float64 with m = 6 rows and values below 100: 6 * 1.1e-16 * 100 * a handful of factors.
EXACT = {"rtol": 0.0, "atol": 1e-11}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(4)
    z, upstream = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    module = bnorm_ext.BatchNorm1d(4, eps=EPS).double()
    with torch.no_grad():
        module.weight.copy_(torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
        module.bias.fill_(0.3)
    return module, z, upstream


def test_gradient_of_shift_and_scale(problem):
    """Every row's error term reaches gamma and beta, which the rows share: with equal error terms
    beta's is m times one of them, gamma's is the sum of the normalised column, and each row is
    passed on times gamma."""
    module, z, upstream = problem
    m = len(z)
    module(z).backward(torch.ones_like(z))
    torch.testing.assert_close(module.bias.grad, m * torch.ones(4, dtype=torch.float64), **EXACT)
    normalised = (z - z.mean(0)) / (z.var(0, correction=0) + EPS).sqrt()
    torch.testing.assert_close(module.weight.grad, normalised.sum(0), **EXACT)
    module.zero_grad()
    module(z).backward(upstream)
    torch.testing.assert_close(module.weight.grad, (upstream * normalised).sum(0), **EXACT)
    torch.testing.assert_close(module.bias.grad, upstream.sum(0), **EXACT)


def test_gradient_of_the_normalisation(problem):
    """The notebook's two flows, through the centred value and through the deviation, completed by
    what it leaves out: the mean, too, depends on every row.

    ``d znorm_i / d z_j = (delta_ij - 1/m) * inv - centred_i * centred_j * inv^3 / m``
    """
    module, z, upstream = problem
    m = len(z)
    centred = z - z.mean(0)
    inv = 1 / (z.var(0, correction=0) + EPS).sqrt()
    through_centre = (torch.eye(m, dtype=torch.float64) - 1 / m)[:, :, None] * inv
    through_deviation = -centred[:, None] * centred[None, :] * inv**3 / m
    derived = module.weight.detach() * (through_centre + through_deviation)  # (i, j, column)
    jacobian = torch.autograd.functional.jacobian(module, z)  # (i, column, j, column)
    for column in range(4):
        torch.testing.assert_close(jacobian[:, column, :, column], derived[:, :, column], **EXACT)
        others = [c for c in range(4) if c != column]
        assert torch.equal(
            jacobian[:, column][:, :, others], torch.zeros(m, m, 3, dtype=torch.float64)
        )
    z = z.clone().requires_grad_()
    module(z).backward(upstream)
    expected = torch.einsum("ic,ijc->jc", upstream, derived)
    torch.testing.assert_close(z.grad, expected, **EXACT)


class Classifier(nn.Module):
    """Two classes: linear, batch norm, activation, linear, sigmoid."""

    def __init__(self, inputs: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.l1 = nn.Linear(inputs, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.activation = activation
        self.l2 = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.l2(self.activation(self.bn1(self.l1(x)))))[:, 0]


def ring_and_disc(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the plane inside (0) and around (1) a circle: no line separates them.
    Unequally scaled, as raw features are."""
    generator = torch.Generator().manual_seed(seed)
    label = (torch.arange(count) % 2).double()
    radius = label * 1.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    angle = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points * torch.tensor([3.0, 0.5]), label


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid()], ids=["relu", "sigmoid"])
def test_classifier_trains(activation):
    torch.manual_seed(0)
    native = Classifier(2, 32, activation).double()
    ours = bnorm_ext.convert_batchnorm(copy.deepcopy(native))
    assert type(ours.bn1) is bnorm_ext.BatchNorm1d
    x, label = ring_and_disc(512, seed=1)
    losses: dict[str, list[float]] = {}
    for name, model in (("native", native), ("ours", ours)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses[name] = []
        for epoch in range(25):
            order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch))
            for batch in order.split(64):
                loss = nn.functional.binary_cross_entropy(model(x[batch]), label[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    # The first five steps in float64: Adam divides a gradient by its own size, so one near its eps
    # of 1e-8 turns a rounding of 1e-16 into 1e-8 of a step of 0.05, five times.
    assert losses["ours"][:5] == pytest.approx(losses["native"][:5], abs=1e-9)
    test_x, test_label = ring_and_disc(400, seed=2)
    for model in (native, ours):
        model.eval()
        right = ((model(test_x) > 0.5).double() == test_label).double().mean().item()
        assert right > 0.95
    assert losses["ours"][-1] < 0.1 * losses["ours"][0]
