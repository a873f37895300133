"""The ends of the number range, inf and nan, and the cases in which native itself is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnorm_ext
from tests.common.cases import (
    BOTH,
    DTYPES,
    Case,
    assert_promise,
    case,
    errors,
    kinds,
    measure,
    normal,
    run,
    threads,
    unit_roundoff,
)

LAYOUTS = ["contiguous", "channels_last"]
SHAPE = (6, 5, 17, 13)


# ---- Range ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [1e-25, 1e-4, 1e25])
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_range_of_float32(size, gradient, layout):
    """Squares and products leave float32 although every result fits."""
    dy = normal(SHAPE, 1, 0, gradient)
    assert_promise(case(normal(SHAPE, 0, size, size), layout=layout, dy=dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "eps"), [(1e-18, 1e-40), (1e-12, 1e-30)])
def test_tiny_data_with_tiny_eps(size, eps, layout):
    """rstd is huge. (Below 1e-19 squares are subnormal in float32, and native fails as well.)"""
    c = case(normal(SHAPE, 0, 0, size), layout=layout, eps=eps, dy=normal(SHAPE, 1, 0, size))
    assert_promise(c)


# The CPU kernels take deviations from the mean of a sample of each chunk. What they sample here, by
# the way they walk through each shape: pieces of a row; whole samples; sixteen rows; rows of 48
# joined samples.
SAMPLED = {
    "long rows": ((1, 2, 8192), lambda x: x.view(2, 8, 1024)[:, :, :16]),
    "short rows": ((64, 20, 7, 7), lambda x: x[::16]),
    "channels": ((1024, 128), lambda x: x[::64]),
    "few channels": ((16384, 3), lambda x: x[: 85 * 4 * 48].view(4, 85, 48, 3)[:, 0]),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sample_that_is_no_guide(name):
    """Everything sampled is far from everything else, which has two values, so that every rounding
    of a deviation from the sample's mean errs the same way: 20 units and more in y if it stood."""
    shape, sampled = SAMPLED[name]
    x = torch.where(normal(shape, 3) < 0, 0.1, 0.3)
    sampled(x)[:] = 1000.1
    assert_promise(case(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_products_beyond_65504(layout, dtype):
    """dy, dy * (x - mean) and their sums far over float16's largest value; dx is not."""
    c = case(
        normal(SHAPE, 0, 100, 300),
        dtype,
        layout=layout,
        dy=normal(SHAPE, 1, 3e4, 5e3),
        weight=torch.full((5,), 0.5),
    )
    seen = run(bnorm_ext.batch_norm, c)
    assert (c.dy.float() * c.x.float()).abs().max() > 65504
    assert all(t.isfinite().all() for t in seen.values())
    assert_promise(c)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_overflows_where_native_does(layout, training):
    c = case(
        normal(SHAPE, 0), torch.float16, layout=layout, weight=torch.full((5,), 6e4),
        training=training, running_mean=torch.zeros(5), running_var=torch.ones(5),
    )  # fmt: skip
    ours, native = (run(f, c)["y"] for f in BOTH.values())
    assert ours.isinf().any()
    # A value within rounding of the threshold, 65520, may fall on either side.
    doubtful = (c.x.float().abs() * 6e4 - 65520).abs() < 65520 * 0.05
    assert torch.equal(ours.isinf() | doubtful, native.isinf() | doubtful)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_data(layout, dtype):
    """Training with default eps: var is lost beside eps, y is x * sqrt(1e5) of full precision."""
    tiny = torch.finfo(dtype).smallest_normal
    assert_promise(case(normal(SHAPE, 0, 0, tiny / 4), dtype, layout=layout, bias=None))


# ---- inf and nan ------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("values", [(INF,), (-INF,), (NAN,), (INF, -INF)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_stay_in_their_channel(layout, dtype, values, where, training):
    clean = case(normal(SHAPE, 0), dtype, layout=layout, training=training)
    x, dy = clean.x.clone(), clean.dy.clone()
    for i, value in enumerate(values):
        {"x": x, "dy": dy}[where][2 + i, 3, 5, 4] = value
    dirty = clean.but(x=x, dy=dy)
    ours, untouched = run(bnorm_ext.batch_norm, dirty), run(bnorm_ext.batch_norm, clean)
    native = run(F.batch_norm, dirty)
    for name, t in ours.items():
        dim = 0 if t.dim() == 1 else 1
        others = torch.tensor([0, 1, 2, 4])
        assert torch.equal(
            t.index_select(dim, others), untouched[name].index_select(dim, others)
        ), name
        assert kinds(t.select(dim, 3)) == kinds(native[name].select(dim, 3)), name


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [INF, -INF, NAN, -1.0])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_non_finite_statistics_and_parameters(name, value, training):
    """As native's, but for an infinite weight: native computes x * a + b with b = -a * mean, and
    inf - inf makes nan of what is inf in the formula of batch norm."""
    c = case(normal(SHAPE, 0), training=training)
    vector = getattr(c, name).clone()
    vector[3] = value
    dirty = c.but(**{name: vector})
    ours, right = (run(f, dirty) for f in BOTH.values())
    if name == "weight":
        right["y"] = measure(dirty).reference["y"]
    for key, t in right.items():
        dim = 0 if t.dim() == 1 else 1
        assert kinds(ours[key].select(dim, 3)) == kinds(t.select(dim, 3)), key


# ---- Constant channels: exact -----------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, -7.7, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channel_gives_exactly_the_bias(layout, dtype, value):
    """The mean of equal values is that value rounded to float32; the deviations are 0."""
    c = case(torch.full((4, 5, 33, 35), value), dtype, layout=layout)
    seen = run(bnorm_ext.batch_norm, c)
    assert c.bias is not None
    assert torch.equal(seen["y"], c.bias.to(dtype).view(1, 5, 1, 1).expand(4, 5, 33, 35))


# ---- Where native falls short -----------------------------------------------------------------


@pytest.mark.parametrize(("mean", "native_error"), [(1000.0, 0.5), (1e4, 3.0)])
def test_channels_last_with_large_mean(mean, native_error):
    """One thread, x ~ N(mean, 1): native's float32 sums lose the variance, and the output is off by
    as much as its own standard deviation. Ours is within 4u, whatever the mean."""
    with threads(1):
        x = normal((32, 2, 96, 96), 0, mean).float().contiguous(memory_format=torch.channels_last)
        m = measure(Case(x, torch.ones_like(x)))
        off = {name: (f(x, None, None, training=True) - m.reference["y"]).abs().max().item()
               for name, f in BOTH.items()}  # fmt: skip
    assert off["native"] > native_error, off
    u = unit_roundoff(torch.float32)
    assert off["ours"] < 4 * u * m.scale["y"].max(), off


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_sums(layout):
    """float64: native's plain sums cost it digits that blocks keep."""
    c = case(normal((64, 3, 32, 32), 0, 10), torch.float64, layout=layout)
    m = measure(c)
    ours, native = (errors(run(f, c), m)["y"].max().item() for f in BOTH.values())
    assert ours < native / 4


def test_two_forwards_before_one_backward_with_buffers_written_between():
    """As plain code may write them; DistributedDataParallel's own broadcasts hide from autograd.
    Native saves them for backward, although training never needs them, and refuses."""

    def step(function) -> tuple[Tensor, Tensor]:
        xs = [normal((4, 3, 5, 5), seed).requires_grad_() for seed in (0, 1)]
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for i, x in enumerate(xs):
            with torch.no_grad():
                mean.copy_(mean.clone()), var.copy_(var.clone())
            total = total + (function(x, mean, var, training=True) ** 3).sum() * (i + 1)
        return torch.autograd.grad(total, xs)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(F.batch_norm)
    ours = step(bnorm_ext.batch_norm)
    # Where nothing is written native can do it, and gives the same gradients.
    for i, dx in enumerate(ours):
        x = normal((4, 3, 5, 5), i).requires_grad_()
        right = torch.autograd.grad((F.batch_norm(x, None, None, training=True) ** 3).sum(), x)[0]
        torch.testing.assert_close(dx, (i + 1) * right, rtol=1e-10, atol=1e-12)


def test_module_seen_twice_before_backward():
    """The same, in modules: weight sharing, and the gradients add up."""
    bn = bnorm_ext.BatchNorm2d(3).double()
    native = nn.BatchNorm2d(3).double()
    for module in (bn, native):
        a, b = module(normal((4, 3, 5, 5), 0, 1, 2)), module(normal((2, 3, 5, 5), 1, 5))
        ((a**3).sum() + (b**2 * normal((2, 3, 5, 5), 2)).sum()).backward()
    for ours, theirs in zip(bn.parameters(), native.parameters(), strict=True):
        # Sums of up to 100 terms below 1e3 in float64: far under 1e-9.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("slope", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 5), (6, 3, 17, 13), (40, 16)], ids=str)
def test_slope_that_is_not_finite(shape, slope):
    """Where z is positive it is not used, so that it reaches neither y nor a sum there."""
    x = normal(shape, 0).float()
    x[:, 0] = x[:, 0].abs() + 0.1
    x.requires_grad_()
    dy = normal(shape, 1).float()
    C = shape[1]
    mean, var = torch.zeros(C), torch.ones(C)
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    y = bnorm_ext.batch_norm(x, mean, var, weight, bias, act="leaky_relu", negative_slope=slope)
    right = F.leaky_relu(F.batch_norm(x, mean, var, weight, bias), slope)
    torch.testing.assert_close(y, right, equal_nan=True)
    leaves = (x, weight, bias)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert gradients[1][0].isfinite()
    expected = torch.autograd.grad(right, leaves, dy)
    torch.testing.assert_close(gradients, expected, equal_nan=True)
