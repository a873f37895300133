"""Residual and activation in the pass of batch norm: values and gradients against torch's own
operations and float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import bnorm_ext
from tests.common import fused_cases
from tests.common.cases import DTYPES, threads
from tests.common.fused_cases import ACTS, SLOPE, activate, assert_close, make, native, ours, run

ops = torch.ops.bnorm_ext

# (N, C, spatial...): with what is special. Rows of a channel of 16 and of 256 positions, and
# samples of 128 elements, are where the CPU kernels change their way through the memory.
SHAPES = {
    "vectors": (4, 6, 4, 8),
    "samples joined, odd": (37, 3, 1, 1),
    "samples joined, odd rows": (9, 3, 3, 3),
    "short odd rows": (9, 130, 7, 7),
    "short odd rows, many channels": (3, 300, 3, 3),
    "rows of 169": (5, 20, 13, 13),
    "rows of 225, many channels": (2, 40, 15, 15),
    "long odd rows": (3, 3, 17, 31),
    "long rows": (2, 3, 40, 40),
    "rows in pieces": (2, 2, 96, 97),
    "one channel": (6, 1, 5, 7),
    "one channel, long": (3, 1, 24, 41),
    "1-D": (50, 140),
    "1-D, few channels": (300, 5),
    "1-D with length": (7, 9, 33),
    "3-D": (2, 4, 3, 4, 6),
}
CASES = [
    pytest.param(shape, layout, id=f"{name}-{layout}")
    for name, shape in SHAPES.items()
    for layout in ("contiguous", "channels_last")
    if layout == "contiguous" or len(shape) > 3
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_against_float64_and_torch(shape, layout, dtype):
    # The 16-bit types and float64 differ in loads, stores and width only.
    acts = ACTS if dtype in (torch.float32, torch.bfloat16) else ["relu", "silu"]
    for act, with_residual, training in itertools.product(acts, (False, True), (True, False)):
        f = make(shape, dtype, layout, act, with_residual, training)
        try:
            assert_close(f)
        except AssertionError as error:
            raise AssertionError(
                f"{act}, residual {with_residual}, training {training}:\n{error}"
            ) from None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_rounded_once(act, dtype):
    """16-bit results are the float32 results, rounded; torch's operations round two or three
    times."""
    f = make((8, 16, 10, 10), dtype, "contiguous", act, True, False)
    wide = [None if t is None else t.float() for t in (f.c.x, f.residual)]
    rest = (f.c.running_mean, f.c.running_var, f.c.weight, f.c.bias, False, 0.1, f.c.eps)
    single = ours(wide[0], *rest, residual=wide[1], act=act).to(dtype)
    y = ours(f.c.x, *rest, residual=f.residual, act=act)
    assert torch.equal(y, single)
    theirs = native(f.c.x, *rest, residual=f.residual, act=act)
    right = activate(fused_cases.pre_activation(f), act)
    mine, other = ((t.double() - right).abs().mean() for t in (y, theirs))
    assert mine < 0.8 * other, (mine, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_kinks_infinities_and_nan(act, with_residual, dtype):
    """Statistics are constants here that make z exactly x, or x + residual: the same gradient as
    torch's to the bit at the kinks, and the same infinities and NaN."""
    values = [-torch.inf, -7.0, -3.0, -1.5, -0.0, 0.0, 1.5, 3.0, 6.0, 7.0, torch.inf, torch.nan]
    x = torch.tensor(values, dtype=dtype).repeat(3, 2, 9)
    residual = None
    if with_residual:
        x, residual = x.nan_to_num(0, 0, 0) * 0.5, x.clone()
        residual = torch.where(residual.isfinite(), residual * 0.5, residual)
    dy = torch.ones_like(x)
    dy[1], dy[2] = -2, torch.inf
    eps = 2.0**-10
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    statistics = (torch.zeros(2, dtype=kind), torch.full((2,), 1 - eps, dtype=kind))

    def results(function):
        leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
        y = function(
            leaves[0], *statistics, None, None, False, 0.1, eps,
            residual=leaves[1] if with_residual else None, act=act,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for i, (mine, theirs) in enumerate(zip(results(ours), results(native), strict=True)):
        if act in ("relu6", "hardswish") and i > 0:
            # Where z is NaN torch has either gradient, by the place in the tensor.
            known = ~(x if residual is None else residual).isnan()
            mine, theirs = mine[known], theirs[known]
        finite = theirs.isfinite()
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isfinite(), finite)
        assert torch.equal(mine[theirs.isinf()], theirs[theirs.isinf()])
        # Silu's exp is not torch's; the others are exact here but for hardswish's division.
        u = torch.finfo(dtype).eps
        tolerance = 8 * u if act == "silu" else u if act == "hardswish" else 0
        torch.testing.assert_close(mine[finite], theirs[finite], rtol=tolerance, atol=0)


@pytest.mark.parametrize("act", ["silu", "hardswish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_smooth_activations_over_the_whole_range(act, dtype):
    """exp from underflow to overflow: z is x."""
    z = torch.linspace(-200, 120, 100_001, dtype=torch.float64).to(dtype).reshape(1, 1, -1)
    eps = 2.0**-10
    statistics = (torch.zeros(1, dtype=dtype), torch.full((1,), 1 - eps, dtype=dtype))
    x = z.clone().requires_grad_()
    y = bnorm_ext.batch_norm(x, *statistics, eps=eps, act=act)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected, slope = activate(z.double(), act), fused_cases.slope_of(z.double(), act)
    info = torch.finfo(dtype)
    # act' is a difference of numbers up to 1, hence its absolute bound.
    torch.testing.assert_close(y.double(), expected, rtol=4 * info.eps, atol=4 * info.tiny)
    torch.testing.assert_close(dx.double(), slope, rtol=4 * info.eps, atol=4 * info.eps)


def split_dy(shape, dtype, layout, act):
    f = make(shape, dtype, layout, act, True, True)
    c = f.c
    _, mean, rstd, mask = ops.batch_norm_training(
        c.x, f.residual, c.weight, c.bias, None, None, None, 0.1, c.eps, act, SLOPE, True
    )
    return f, mean, rstd, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_mask_is_what_recomputing_gives(shape, layout, dtype):
    for act in ("relu", "relu6", "leaky_relu"):
        f, mean, rstd, mask = split_dy(shape, dtype, layout, act)
        c = f.c
        rest = (c.weight, c.bias, None, None, mean, rstd, True, c.eps)
        want = [True, True, True, True]
        assert mask.numel() <= c.x.numel() / 8 + c.x.numel() / min(c.x[0, 0].numel() + 1, 16) + 9
        with_mask = ops.batch_norm_backward(c.dy, c.x, None, *rest, mask, act, SLOPE, want)
        without = ops.batch_norm_backward(c.dy, c.x, f.residual, *rest, None, act, SLOPE, want)
        for a, b in zip(with_mask, without, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(33, 67, 7, 7), (16, 24, 33, 33), (3, 2, 300, 301), (5000, 3, 1, 1), (6, 700, 15, 15)]
)
def test_same_bits_for_any_number_of_threads(shape, dtype, layout, act):
    f = make(shape, dtype, layout, act, True, True)
    with threads(1):
        first = run(ours, f)
    for count in (2, 3, 7):
        with threads(count):
            for name, t in run(ours, f).items():
                assert torch.equal(t, first[name]), (name, count)
    inference = fused_cases.Fused(f.c.but(training=False), f.residual, act)
    with threads(1):
        first = run(ours, inference)
    for count in (2, 5):
        with threads(count):
            for name, t in run(ours, inference).items():
                assert torch.equal(t, first[name]), (name, count)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_enough_to_be_streamed(layout):
    """Large outputs are written past the caches: other loops, the same bits."""
    f = make((16, 72, 64, 61), torch.float32, layout, "relu", True, True)
    assert f.c.x.nbytes >= 16 << 20
    assert_close(f)
    with threads(2):
        two = run(ours, f)
    with threads(1):
        one = run(ours, f)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("act", ["relu", "hardswish"])
def test_any_strides(act):
    """Residual, input and dy in layouts of their own; an expanded residual."""
    f = make((4, 6, 5, 8), torch.float64, "contiguous", act, True, True)
    right = run(ours, f)
    x, residual = f.c.x, f.residual
    last = torch.channels_last
    wide = torch.zeros(4, 6, 5, 16, dtype=x.dtype)
    strided = wide[..., ::2].copy_(residual)
    for x2, r2, dy2 in (
        (x.contiguous(memory_format=last), residual, f.c.dy),
        (x, residual.contiguous(memory_format=last), f.c.dy.contiguous(memory_format=last)),
        (x.transpose(2, 3).contiguous().transpose(2, 3), strided, f.c.dy),
    ):
        g = fused_cases.Fused(f.c.but(x=x2, dy=dy2), r2, act)
        got = run(ours, g)
        for name in right:
            # Other layouts add up in another order.
            torch.testing.assert_close(got[name], right[name], rtol=1e-12, atol=1e-12)
    row = torch.randn(1, 1, 1, 8, dtype=x.dtype).expand(4, 6, 5, 8)
    got = run(ours, fused_cases.Fused(f.c, row, act))
    expected = run(ours, fused_cases.Fused(f.c, row.contiguous(), act))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("act", ACTS)
def test_empty(act):
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    r = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = bnorm_ext.batch_norm(x, torch.zeros(3), torch.ones(3), residual=r, act=act)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == r.grad.shape == x.shape


def test_native_path_does_the_same(monkeypatch):
    """Where there are no kernels."""
    f = make((4, 6, 5, 7), torch.float64, "contiguous", "relu6", True, True)
    right = run(ours, f)
    monkeypatch.setattr(bnorm_ext.functional, "_takes_native_path", lambda x: True)
    for name, t in run(ours, f).items():
        torch.testing.assert_close(t, right[name], rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, 4, 4)
    for bad in (torch.randn(3, 1, 1), x.double(), x.half()):  # torch would broadcast or promote
        with pytest.raises(RuntimeError, match="residual must be like the input"):
            bnorm_ext.batch_norm(x, None, None, training=True, residual=bad)


def test_refused():
    x, buffers = torch.randn(4, 3, 5, 5), (torch.zeros(3), torch.ones(3))
    before = [t.clone() for t in buffers]

    def call(**options):
        return bnorm_ext.batch_norm(x, *buffers, training=True, **options)

    for bad in (
        torch.randn(4, 3, 5, 4),
        torch.randn(1, 3, 1, 1),
        torch.randn(3, 1, 1),
        x.double(),
        x.half(),
        x.to("meta"),
    ):
        with pytest.raises(RuntimeError, match=r"residual must be like|is not on the expected"):
            call(residual=bad)
    for bad in ("ReLU", "gelu", torch.nn.GELU, torch.nn.GELU(), torch.nn.Hardtanh(0, 6), F.relu, 3):
        with pytest.raises(ValueError, match=r"identity, relu, relu6, leaky_relu, silu, hardswish"):
            call(act=bad)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_directions_see_the_same_side_of_a_kink(layout):
    """Far from 0, where a mean that is known better moves many z across it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 32, 48, generator=generator) + 1e4
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(6, generator=generator)
    bias = torch.randn(6, generator=generator).requires_grad_()
    y = bnorm_ext.batch_norm(x, None, None, weight, bias, True, act="relu")
    y.sum().backward()
    assert torch.equal(bias.grad, (y > 0).sum((0, 2, 3)).float())
