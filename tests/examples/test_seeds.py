"""The systems that this project started from, each reproduced as a test of its own.

000: hand-written 1-D and 2-D modules. 001: a walk-through with printed numbers. 002: an annotated
implementation for any rank. 003: a forum answer's gamma and beta. 004: a starter notebook.

Numbers that the originals print are given as printed, with four decimals: half a unit of the last
one is 5e-5, beside which float32 rounding of values of this size (2**-24 * 120 = 7e-6) fits in
``PRINTED``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnorm_ext

PRINTED = {"rtol": 0.0, "atol": 6e-5}
# float64 comparisons: sums of at most 32768 terms of size one, 32768 * 1.1e-16 = 4e-12.
EXACT = {"rtol": 0.0, "atol": 1e-11}


def per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.view(1, -1, *[1] * (x.dim() - 2))


def channel_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


class Handwritten(nn.Module):
    """Batch norm in plain torch as seeds 000 and 002 have it: *biased* running variance.

    ``raw_moments`` takes the variance as E[x^2] - E[x]^2, as 002 does.
    """

    def __init__(self, channels, momentum=0.1, *, affine=True, track=True, raw_moments=False):
        super().__init__()
        self.eps, self.momentum, self.raw_moments = 1e-5, momentum, raw_moments
        self.gamma = nn.Parameter(torch.ones(channels)) if affine else None
        self.beta = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("mean", torch.zeros(channels) if track else None)
        self.register_buffer("var", torch.ones(channels) if track else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.mean is None:
            mean = x.mean(channel_dims(x))
            if self.raw_moments:
                var = (x**2).mean(channel_dims(x)) - mean**2
            else:
                var = x.var(channel_dims(x), correction=0)
            if self.training and self.mean is not None:
                with torch.no_grad():
                    self.mean.lerp_(mean, self.momentum)
                    self.var.lerp_(var, self.momentum)
        else:
            mean, var = self.mean, self.var
        y = (x - per_channel(mean, x)) / torch.sqrt(per_channel(var, x) + self.eps)
        if self.gamma is None:
            return y
        return per_channel(self.gamma, x) * y + per_channel(self.beta, x)


def batches(shape, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("shape", "ours"),
    [((32, 128), bnorm_ext.BatchNorm1d), ((32, 3, 32, 32), bnorm_ext.BatchNorm2d)],
    ids=["1d", "2d"],
)
def test_seed_000_handwritten_modules(shape, ours):
    channels = shape[1]
    ours, theirs = ours(channels).double(), Handwritten(channels).double()
    with torch.no_grad():
        for a, b in ((ours.weight, theirs.gamma), (ours.bias, theirs.beta)):
            a.copy_(b.uniform_(-2, 2))
    data = batches(shape)
    for x in data:
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(a), theirs(b)
        assert y.shape == shape
        torch.testing.assert_close(y, expected, **EXACT)
        (y**3).sum().backward(), (expected**3).sum().backward()
        # The gradient of a sum of cubes: each term is of size |y|**2 * |weight| / std, below 1e4,
        # and so are the sums over a channel divided by their length.
        torch.testing.assert_close(a.grad, b.grad, rtol=0.0, atol=1e-11 * 1e4)
    torch.testing.assert_close(ours.running_mean, theirs.mean, **EXACT)
    # The average that they keep is of biased variances, ours of unbiased ones, n / (n - 1) times
    # as large; the first value, 1, is the same in both and has weight 0.9**steps.
    n = data[0].numel() // channels
    start = 0.9 ** len(data)
    assert not torch.allclose(ours.running_var, theirs.var, **EXACT)
    torch.testing.assert_close(
        ours.running_var, start + (theirs.var - start) * n / (n - 1), **EXACT
    )
    # In evaluation the two therefore differ, and agree once they have the same statistics.
    ours.eval(), theirs.eval()
    assert not torch.allclose(ours(data[0]), theirs(data[0]), **EXACT)
    ours.running_var.copy_(theirs.var)
    torch.testing.assert_close(ours(data[0]), theirs(data[0]), **EXACT)


def expect_state(module, mean, var, count):
    torch.testing.assert_close(module.running_mean, torch.tensor(mean), **PRINTED)
    torch.testing.assert_close(module.running_var, torch.tensor(var), **PRINTED)
    assert module.num_batches_tracked.item() == count


THREE_BY_FIVE = torch.arange(15.0).view(3, 5)
NORMALISED = torch.tensor([[-1.2247], [0.0], [1.2247]]).expand(3, 5)


def test_seed_001_fresh_module():
    module = bnorm_ext.BatchNorm1d(5)
    assert repr(module) == repr(nn.BatchNorm1d(5))
    for part in (
        "BatchNorm1d(5, eps=1e-05, momentum=0.1, affine=True",
        "track_running_stats=True)",
    ):
        assert part in repr(module)
    assert list(module.state_dict()) == [
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    assert torch.equal(module.weight, torch.ones(5))
    assert torch.equal(module.bias, torch.zeros(5))
    expect_state(module, [0.0] * 5, [1.0] * 5, 0)
    shown = {"training": True, "num_features": 5, "eps": 1e-5, "momentum": 0.1, "affine": True}
    assert shown.items() <= vars(module).items()


def test_seed_001_first_step():
    module = bnorm_ext.BatchNorm1d(5)
    y = module(THREE_BY_FIVE)
    torch.testing.assert_close(y, NORMALISED, **PRINTED)
    expect_state(module, [0.5, 0.6, 0.7, 0.8, 0.9], [3.4] * 5, 1)
    mean, var = THREE_BY_FIVE.mean(0), THREE_BY_FIVE.var(0, correction=0)
    torch.testing.assert_close(mean, torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0]), **PRINTED)
    torch.testing.assert_close(var, torch.full((5,), 16.6667), **PRINTED)
    torch.testing.assert_close((THREE_BY_FIVE - mean) / var.sqrt(), y, **PRINTED)


def test_seed_001_momentum():
    whole = bnorm_ext.BatchNorm1d(5, momentum=1)
    torch.testing.assert_close(whole(THREE_BY_FIVE), NORMALISED, **PRINTED)
    expect_state(whole, [5.0, 6.0, 7.0, 8.0, 9.0], [25.0] * 5, 1)

    half = bnorm_ext.BatchNorm1d(5, momentum=0.5)
    torch.testing.assert_close(half(THREE_BY_FIVE), NORMALISED, **PRINTED)
    expect_state(half, [2.5, 3.0, 3.5, 4.0, 4.5], [13.0] * 5, 1)
    torch.testing.assert_close(half(2 * THREE_BY_FIVE), NORMALISED, **PRINTED)
    expect_state(half, [6.25, 7.5, 8.75, 10.0, 11.25], [56.5] * 5, 2)  # 13 / 2 + 100 / 2


def test_seed_001_gradients_and_optimizer_step():
    module = bnorm_ext.BatchNorm1d(5)
    module(THREE_BY_FIVE).sum().backward()
    assert torch.equal(module.weight.grad, torch.zeros(5))  # printed as exact zeros
    torch.testing.assert_close(module.bias.grad, torch.full((5,), 3.0), **PRINTED)
    torch.optim.RMSprop(module.parameters(), lr=0.01).step()
    torch.testing.assert_close(module.bias.detach(), torch.full((5,), -0.1), **PRINTED)
    assert torch.equal(module.weight.detach(), torch.ones(5))


def test_seed_001_images():
    module = bnorm_ext.BatchNorm2d(2)
    expect_state(module, [0.0, 0.0], [1.0, 1.0], 0)
    y = module(torch.arange(120.0).view(3, 2, 4, 5))
    first = [
        [-1.4925, -1.4624, -1.4322, -1.4021, -1.3719],
        [-1.3418, -1.3116, -1.2815, -1.2513, -1.2212],
        [-1.1910, -1.1609, -1.1307, -1.1006, -1.0704],
        [-1.0403, -1.0101, -0.9799, -0.9498, -0.9196],
    ]
    middle = [
        [-0.2864, -0.2563, -0.2261, -0.1960, -0.1658],
        [-0.1357, -0.1055, -0.0754, -0.0452, -0.0151],
        [0.0151, 0.0452, 0.0754, 0.1055, 0.1357],
        [0.1658, 0.1960, 0.2261, 0.2563, 0.2864],
    ]
    last = -torch.tensor(first).flip(0, 1)  # printed from 0.9196 on: the input is symmetric
    assert last[0].tolist() == pytest.approx([0.9196, 0.9498, 0.9799, 1.0101, 1.0403])
    expected = torch.stack([torch.tensor(first), torch.tensor(middle), last])
    for channel in range(2):  # both channels print the same
        torch.testing.assert_close(y[:, channel], expected, **PRINTED)
    expect_state(module, [4.95, 6.95], [112.7559, 112.7559], 1)


RANKS = {
    (16, 6): bnorm_ext.BatchNorm1d,
    (8, 6, 10): bnorm_ext.BatchNorm1d,
    (4, 6, 5, 7): bnorm_ext.BatchNorm2d,
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_seed_002_shapes_and_switches(shape, affine, track):
    ours = RANKS[shape](6, affine=affine, track_running_stats=track).double()
    theirs = Handwritten(6, affine=affine, track=track, raw_moments=True).double()
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 2 * affine
    data = batches(shape)
    for x in data:
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    if track:
        n = data[0].numel() // 6
        torch.testing.assert_close(ours.running_mean, theirs.mean, **EXACT)
        start = 0.9 ** len(data)
        torch.testing.assert_close(
            ours.running_var, start + (theirs.var - start) * n / (n - 1), **EXACT
        )
        ours.running_var.copy_(theirs.var)
    else:
        assert ours.running_var is None
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(data[0]), theirs(data[0]), **EXACT)


def test_seed_002_zeros():
    """Its own check: zeros of 2 x 3 x 2 x 4 keep their shape; the variance is one per channel."""
    ours = bnorm_ext.BatchNorm2d(3)
    y = ours(torch.zeros(2, 3, 2, 4))
    assert torch.equal(y, torch.zeros(2, 3, 2, 4))
    expect_state(ours, [0.0] * 3, [0.9] * 3, 1)


@pytest.mark.parametrize("mean", [3e3, 1e4])
def test_seed_002_large_mean_defeats_its_variance_but_not_ours(mean):
    """E[x^2] is about mean**2 and known to u * mean**2 (u = 2**-24): 0.5 at a mean of 3000, 6 at
    10000, while the variance that should be left after subtracting E[x]^2 is 1."""
    x = (torch.randn(16, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + mean).float()
    exact = Handwritten(6).double()(x.double())
    ours = bnorm_ext.BatchNorm2d(6)
    y = ours(x)
    # The promise for float32: at most 4u, on values up to about 5.
    u = 2.0**-24
    assert (y - exact).abs().max().item() <= 5 * 4 * u
    var = x.double().var((0, 2, 3))
    torch.testing.assert_close(ours.running_var.double(), 0.9 + 0.1 * var, rtol=1e-5, atol=0.0)
    wrong = (Handwritten(6, raw_moments=True)(x) - exact).abs()
    assert not (wrong < 0.02).all()  # far off, or NaN from the root of a negative variance


def test_seed_003_gamma_and_beta():
    gamma, beta = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([34.0, 35.0, 69.0])
    images = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    module = bnorm_ext.BatchNorm2d(3)
    module.weight, module.bias = nn.Parameter(gamma), nn.Parameter(beta)
    y = module(images)
    mean = images.mean((0, 2, 3))[:, None, None]
    std = images.std((0, 2, 3), correction=0)[:, None, None]
    by_hand = (images - mean) / std * gamma[:, None, None] + beta[:, None, None]
    one_by_one = torch.stack([(image - mean) / std for image in images])  # as a data transform
    one_by_one = one_by_one * gamma[:, None, None] + beta[:, None, None]
    assert torch.allclose(by_hand, one_by_one, rtol=1e-4)
    assert torch.allclose(by_hand, y, rtol=1e-4)  # the answer's criterion; by hand has no eps
    # eps = 1e-5 under a variance near 1 shortens gamma by 5e-6; float32 sums of values up to 80
    # err by less than 80 * 2**-24 * 8.
    torch.testing.assert_close(y.mean((0, 2, 3)), beta, rtol=0.0, atol=4e-5)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), gamma, rtol=0.0, atol=6e-5)
    assert y.shape == images.shape
