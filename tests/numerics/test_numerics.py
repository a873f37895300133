"""Ours, native and float64 side by side: the promise that `cases` states holds for ordinary, odd
and hostile data of every dtype in every layout."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

import bnorm_ext
from tests.common.cases import (
    BOTH,
    DTYPES,
    assert_exact,
    assert_promise,
    case,
    normal,
    run,
    threads,
)

LAYOUTS = {
    "contiguous": ("contiguous", (16, 8, 17, 19)),
    "channels_last": ("channels_last", (16, 8, 17, 19)),
    "channels_last_3d": ("channels_last_3d", (6, 5, 7, 9, 11)),
    "rows": ("contiguous", (5000, 5)),
    "long": ("contiguous", (2, 3, 9001)),
}
SHAPES = [
    (2, 1),
    (3, 2),
    (2, 129),
    (1, 3, 2),
    (2, 3, 1),
    (7, 1, 5),
    (2, 17, 3),
    (1, 1, 1, 2),
    (1, 5, 3, 1),
    (3, 33, 1, 7),
    (2, 257, 2, 2),
    (5, 130, 3, 3),
    (1, 2, 1, 1, 3),
    (2, 7, 3, 2, 5),
    (2, 3, 2, 2, 2, 2),
    (4097, 3),
    (1, 2, 4097),
    (2, 3, 65, 64),
    (33001, 2),
    (2, 50021),
]
ids = {"ids": lambda v: str(v).removeprefix("torch.").replace(" ", "")}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Results do not depend on it (test_determinism.py); threads that wait for busy cores only cost
    time."""
    with threads(1):
        yield


def layouts_of(shape: tuple[int, ...]) -> list[str]:
    return ["contiguous", *{4: ["channels_last"], 5: ["channels_last_3d"]}.get(len(shape), [])]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("shape", SHAPES, **ids)
def test_shapes(shape, dtype, training):
    for layout in layouts_of(shape):
        assert_promise(case(normal(shape, 0, 0.5), dtype, layout=layout, training=training))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("mean", [0.0, -3.0, 1e2, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_means(layout, dtype, mean, training):
    """Means up to 1e5 standard deviations; 16-bit data cannot hold them beside that."""
    if abs(mean) > 1e2 and torch.finfo(dtype).bits == 16:
        mean = 1e2
    name, shape = LAYOUTS[layout]
    statistics = {} if training else {"running_mean": normal((shape[1],), 9, mean, 0.1)}
    assert_promise(
        case(normal(shape, 1, mean), dtype, layout=name, training=training, **statistics)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 16, 24), (2, 37, 1, 1), (1, 24, 1, 2)], ids=str)
def test_mean_is_known_beyond_float(shape, layout) -> None:
    """What rounding it leaves out would grow in y by |mean| / std."""
    for mean in (1, 1e4):
        c = case(normal(shape, seed=6, mean=mean), torch.float32, layout=layout)
        assert_exact(c, run(BOTH["ours"], c)["y"])


@pytest.mark.parametrize("parameters", ["data", "float32", "none", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_parameters(dtype, training, parameters):
    kwargs: dict[str, object] = {"parameters": dtype if parameters == "data" else None}
    if parameters in ("none", "weight"):
        kwargs["bias"] = None
    if parameters in ("none", "bias"):
        kwargs["weight"] = None
    for layout in ("contiguous", "channels_last"):
        x = normal((8, 19, 9, 7), 2, 1)
        assert_promise(case(x, dtype, layout=layout, training=training, **kwargs))


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.5, -0.3, 1.7])
def test_momentum(momentum):
    for dtype in DTYPES:
        assert_promise(case(normal((8, 6, 11, 5), 3, 2), dtype, momentum=momentum))


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0, 100.0])
def test_eps(eps):
    for dtype in DTYPES:
        assert_promise(case(normal((8, 6, 11, 5), 4, 2), dtype, eps=eps))


@pytest.mark.parametrize("gradient", ["large", "small", "mean", "along x"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout, dtype, gradient):
    """dy far from centred: of one sign, tiny, and such that dx cancels to about 0."""
    name, shape = LAYOUTS[layout]
    x = normal(shape, 5, 1)
    dy = {
        "large": lambda: normal(shape, 6, 100),
        "small": lambda: normal(shape, 6, 0, 1e-4),
        "mean": lambda: torch.full(shape, 1 / 3, dtype=torch.float64),
        "along x": lambda: 3 * x - 1,
    }[gradient]()
    assert_promise(case(x, dtype, layout=name, dy=dy))


def with_outlier(shape: tuple[int, ...], position: float, size: float) -> Tensor:
    """N(0, 1) with one value of that size in each channel, at that fraction of its positions."""
    x = normal(shape, 7).transpose(0, 1)
    flat = x.flatten(1).clone()
    flat[:, round(position * (flat.shape[1] - 1))] = size
    return flat.reshape(x.shape).transpose(0, 1)


@pytest.mark.parametrize("size", [1e5, -1e12])
@pytest.mark.parametrize("position", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outlier(layout, dtype, position, size):
    name, shape = LAYOUTS[layout]
    assert_promise(case(with_outlier(shape, position, size), dtype, layout=name))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_alternating_signs(layout, dtype, size):
    """Huge values of both signs that cancel in the mean, along every axis of a sum."""
    name, shape = LAYOUTS[layout]
    sign = torch.ones(shape, dtype=torch.float64)
    sign[1::2] *= -1
    sign[..., 1::2] *= -1
    assert_promise(case(sign * size + normal(shape, 8), dtype, layout=name))


# Magnitudes whose repeated addition rounds the same way every time: the worst case for a running
# sum. 0/1 images, signs, masks and quantised activations look like this, and the gradient of a
# mean is constant.
@pytest.mark.parametrize("value", [1.0, 1.1, 0.3, 1.3333, 1.9])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_valued(layout, dtype, value):
    name, shape = LAYOUTS[layout]
    x = torch.where(normal(shape, 10) > 0, value, -value)
    assert_promise(case(x.double(), dtype, layout=name, dy=torch.full(shape, value / 3)))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.7, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels(layout, dtype, value):
    """Variance 0: the output is the bias, and nothing divides by 0."""
    if dtype == torch.float16 and value == 1e5:
        value = 6e4
    name, shape = LAYOUTS[layout]
    c = case(torch.full(shape, value), dtype, layout=name, running_var=torch.ones(shape[1]))
    seen = assert_promise(c)
    assert seen["running_var"][0] <= 1


@pytest.mark.parametrize(
    "shape", [(64, 5, 7, 1), (127, 2, 13), (40000, 8), (3000, 40), (6, 3, 300)], ids=str
)
def test_sums_of_equal_values(shape):
    """All additions of a sum round to the same side, hundreds of them if they came one after the
    other. In units of float64, which has no wider type to add in."""
    x, dy = normal(shape, 0), torch.full(shape, 0.7, dtype=torch.float64)
    count = x.numel() // shape[1]
    bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
    y = bnorm_ext.batch_norm(x, None, None, None, bias, training=True)
    (dbias,) = torch.autograd.grad(y, bias, dy)
    right = Fraction(0.7) * count
    assert max(abs(Fraction(v) / right - 1) for v in dbias.tolist()) < 6 * 2.0**-53
