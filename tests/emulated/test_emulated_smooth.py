"""silu and hardswish in the CUDA kernels, which multiply by reciprocals, run by the emulator: value
by value over the whole range of float32.

The statistics are such that z has the bits of x. The emulator's reciprocal is as wrong as a GPU's
may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnorm_ext.activations import compose
from tests.common import emulated

U = 2.0**-24
LEAST = 2.0**-149  # the smallest positive float32


def values() -> Tensor:
    """Both signs of every binary exponent and of what lies between; where the functions bend, more;
    infinities, NaN, zeros."""
    generator = torch.Generator().manual_seed(3)
    magnitudes = torch.exp2(torch.linspace(-149, 127.99, 6000, dtype=torch.float64))
    near = 12 * torch.rand(24000, generator=generator, dtype=torch.float64)
    both = torch.cat([magnitudes, near]).float()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4028235e38, -3.4028235e38])
    found = torch.cat([both, -both, special, torch.zeros(64)])
    return found[: found.numel() // 64 * 64].view(1, 64, -1, 1)


def computed(act: str, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient of z."""
    channels = x.shape[1]
    with emulated.session() as s:
        mean = s.copy(torch.zeros(channels), inout=True)
        var = s.copy(torch.full((channels,), 0.5), inout=True)  # eps as well: rstd is 1
        x, dy = s.copy(x), s.copy(dy)
        rest = (None, None, mean, var)
        y, _ = s.call("batch_norm_inference", x, None, *rest, 0.5, act, 0.0, False)
        dx, *_ = s.call(
            *("batch_norm_backward", dy, x, None, *rest, None, None, False, 0.5, None, act, 0.0),
            [True, False, False, False],
        )
        return y.clone(), dx.clone()


def expected(act: str, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    z = x.double().requires_grad_()
    y = compose(z, None, act, 0.0)
    (g,) = torch.autograd.grad(y, z, dy.double())
    return y.detach(), g


def excess(ours: Tensor, right: Tensor, scale: Tensor) -> float:
    """The largest error in units of `scale`, over the values that are finite. The others must be
    the same."""
    rounded = right.float()
    finite = rounded.isfinite()
    assert torch.equal(ours[~finite].isnan(), rounded[~finite].isnan())
    infinite = rounded.isinf()
    assert torch.equal(ours[infinite], rounded[infinite])
    return ((ours.double() - right).abs() / scale)[finite].max().item()


@pytest.mark.parametrize("act", ["silu", "hardswish"])
def test_values_over_the_whole_range(act: str) -> None:
    """With IEEE's division silu would be within 3.6 and its derivative within 4.6 units; without
    the Newton step, within 4.6 and 5.9."""
    x = values()
    (y, g), (right_y, right_g) = (f(act, x, torch.ones_like(x)) for f in (computed, expected))
    z = x.double().abs()
    if act == "silu":
        s = torch.sigmoid(x.double())
        # exp(-z) is subnormal before z is so large that silu is 0.
        assert excess(y, right_y, U * right_y.abs() + (1 + z) * LEAST) < 4.2
        assert excess(g, right_g, U * (s + z * s * (1 - s)) + (1 + z) * LEAST) < 4.6
    else:
        # Beyond 3, y is x.
        assert torch.equal(y[x >= 3], x[x >= 3])
        assert excess(y, right_y, U * z * ((z + 3) / 6).clamp(max=1) + LEAST) < 3.5
        assert excess(g, right_g, U * (z.clamp(max=3) / 3 + 0.5) + LEAST) < 2
