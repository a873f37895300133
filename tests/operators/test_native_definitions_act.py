"""PyTorch's definitions of nn.BatchNorm1d/2d/3d given to BatchNormAct1d/2d/3d: every input and
constructor argument there, composed with each activation, with and without an addition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum

import bnorm_ext
from bnorm_ext.bench.promise import Measure
from bnorm_ext.reference import batch_norm_reference
from tests.common.cases import (
    DTYPES,
    Case,
    Results,
    accumulation_type,
    measure,
    per_channel,
    unit_roundoff,
)
from tests.common.fused_cases import ACTS, KINKS, SLOPE, activate
from tests.common.native_definitions import (
    CLASSES,
    TRAINING,
    case_of_module,
    error_samples,
    module_samples,
)
from tests.common.twins import outcome

pytestmark = pytest.mark.usefixtures("one_thread")

FUSED = {
    nn.BatchNorm1d: bnorm_ext.BatchNormAct1d,
    nn.BatchNorm2d: bnorm_ext.BatchNormAct2d,
    nn.BatchNorm3d: bnorm_ext.BatchNormAct3d,
}
Modules = tuple[nn.Module, nn.Module]


def pair(cls: type, sample: Any, dtype: torch.dtype, training: bool, act: str) -> Modules:
    """Ours with an activation, and native without."""
    made = sample.constructor_input
    native = cls(*made.args, **made.kwargs).to(dtype).train(training)
    with torch.no_grad():
        for t in (*native.parameters(), *native.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 2)
    kwargs = {n: v for n, v in made.kwargs.items() if n != "bias"}
    ours = FUSED[cls](*made.args, **kwargs, act=act, negative_slope=SLOPE)
    if made.kwargs.get("bias") is False:
        ours.bias = None  # as an older torch says it; the argument has a test of its own
    ours.to(dtype).train(training).load_state_dict(native.state_dict(), strict=True)
    return ours, native


def cases(
    cls: type, dtype: torch.dtype, training: bool
) -> Iterator[tuple[Any, str, Tensor, Tensor | None]]:
    """Sample, activation, input, residual: each activation for each sample, in turn with and
    without a residual, so that each activation meets both."""
    for i, sample in enumerate(module_samples(cls, dtype, training, gradient=False)):
        (x,) = sample.forward_input.args
        generator = torch.Generator().manual_seed(1)
        residual = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
        for j, act in enumerate(ACTS):
            yield sample, act, x, residual if (i + j) % 2 else None


def results(module: nn.Module, act: str | None, x: Tensor, r: Tensor | None, dy: Tensor) -> Results:
    """Everything that came out or changed; act: what is done afterwards."""
    a, b = (t if t is None else t.detach().clone().requires_grad_() for t in (x, r))
    if act is None:
        y = module(a) if b is None else module(a, b)
    else:
        z = module(a)
        y = activate(z if b is None else z + b, act)
    y.backward(dy)
    found = {"y": y.detach(), "dx": a.grad, **dict(module.named_buffers())}
    if b is not None:
        found["dresidual"] = b.grad
    return found | {f"d{n}": p.grad for n, p in module.named_parameters()}


def away_from_kinks(native: nn.Module, act: str, x: Tensor, r: Tensor | None) -> Tensor:
    """A dy that is 0 where rounding decides on a gradient."""
    c = case_of_module(native, x, x)
    dy = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)
    if x.numel():
        z = measure(c.but(dy=dy)).reference["y"]
        z = z if r is None else z + r.double()
        near = torch.zeros_like(z, dtype=torch.bool)
        for kink in KINKS.get(act, []):
            near |= (z - kink).abs() < 0.1
        dy = dy.masked_fill(near, 0)
    return dy.to(x.dtype)


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@CLASSES
def test_module_samples(cls, dtype, training):
    """Against the composition in float64; within 40 units of what is added, as `cases` explains
    them, and for 16-bit results one rounding more at the end. Shapes, dtypes and strides are those
    of the composition in the dtype itself."""
    seen = 0
    for sample, act, x, r in cases(cls, dtype, training):
        ours, native = pair(cls, sample, dtype, training, act)
        dy = away_from_kinks(native, act, x, r)
        _, again = pair(cls, sample, dtype, training, act)
        wide = cls(native.num_features, native.eps, native.momentum, native.affine,
                   native.track_running_stats, dtype=torch.float64)  # fmt: skip
        if native.affine and native.bias is None:
            wide.bias = None
        again.load_state_dict(ours.state_dict())
        wide.train(training).load_state_dict(ours.state_dict())
        c = case_of_module(native, x, dy)
        found, shaped = results(ours, None, x, r, dy), results(again, act, x, r, dy)
        right = results(wide, act, x.double(), None if r is None else r.double(), dy.double())
        assert found.keys() == right.keys() == shaped.keys()
        m = measure(c) if x.numel() else None
        for name, t in right.items():
            mine, like = found[name], shaped[name]
            assert (mine.shape, mine.dtype) == (like.shape, like.dtype), name
            assert mine.stride() == like.stride(), name
            if m is None or name == "num_batches_tracked":
                assert torch.equal(mine.double(), t.double()), name
                continue
            scale = scales(c, r, m)[name]
            allowed = scale * 40 * (1 + m.ratio) * unit_roundoff(accumulation_type(dtype))
            if dtype != accumulation_type(dtype):
                allowed = allowed + scale * 2 * unit_roundoff(dtype)
            off = per_channel(mine.double() - t)
            assert not (off > allowed).any(), (name, act, r is None, off / allowed)
            seen += 1
    assert seen > 100


def unit(dtype: torch.dtype) -> float:
    return unit_roundoff(accumulation_type(dtype))


def scales(c: Case, r: Tensor | None, m: Measure) -> Results:
    """As in `cases`, for any gradient g of size 1.5 |dy| at most: act' is at most 1.5. So |g| is
    in the place of g where it is averaged, and nothing cancels."""
    weight, bias = (
        default if t is None else t.double().abs()
        for t, default in ((c.weight, torch.ones(1)), (c.bias, torch.zeros(1)))
    )
    plain = batch_norm_reference(
        c.x, c.running_mean, c.running_var, None, None, c.training, 0, c.eps
    )
    xhat, top, count = per_channel(plain.y), 1.5 * per_channel(c.dy), c.x.numel() / c.x.shape[1]
    return m.scale | {
        "y": weight * xhat + bias + (0 if r is None else per_channel(r)),
        "dx": weight * plain.rstd * top * (2 + xhat**2),
        "dweight": count * top * xhat,
        "dbias": count * top,
        "dresidual": top,
    }


def leaves_of(ours: nn.Module, x: Tensor, r: Tensor | None) -> tuple[Any, list[Tensor]]:
    names = [n for n, _ in ours.named_parameters()]
    given = [x, *(p.detach() for p in ours.parameters()), *([] if r is None else [r])]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=False))
        state |= {n: b.clone() for n, b in ours.named_buffers()}
        rest = values[len(names) :]
        return torch.func.functional_call(ours, state, (x, *rest))

    return forward, [t.clone().requires_grad_() for t in given]


@TRAINING
@CLASSES
def test_module_samples_gradcheck(cls, training):
    """First and second derivatives against finite differences, along random directions."""
    seen = 0
    for sample, act, x, r in cases(cls, torch.float64, training):
        if x.numel() == 0:
            continue
        ours, native = pair(cls, sample, torch.float64, training, act)
        c = case_of_module(native, x, x)
        z = measure(c).reference["y"] if r is None else measure(c).reference["y"] + r
        if any((z - kink).abs().min() < 1e-4 for kink in KINKS.get(act, [])):
            continue  # a finite difference would reach over the kink
        forward, leaves = leaves_of(ours, x, r)
        assert gradcheck(forward, leaves, fast_mode=True), (act, sample)
        assert gradgradcheck(forward, leaves, fast_mode=True), (act, sample)
        seen += 1
    assert seen > 24


@TRAINING
@pytest.mark.parametrize("act", ACTS)
@CLASSES
def test_module_errors(cls, act, training):
    """What is an error natively is the same one here, with a residual too, and nothing moves."""
    for sample in error_samples(cls, torch.float64, training):
        made = sample.module_error_input.constructor_input
        (x,) = sample.module_error_input.forward_input.args
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            continue
        native = cls(*made.args, **made.kwargs).double().train(training)
        expected = outcome(partial(native, x))
        for residual in (None, torch.zeros_like(x)):
            ours = FUSED[cls](*made.args, **made.kwargs, act=act).double().train(training)
            before = {n: t.clone() for n, t in ours.state_dict().items()}
            assert outcome(partial(ours, x, residual)) == expected
            if expected is not None:
                for name, tensor in ours.state_dict().items():
                    assert torch.equal(tensor, before[name]), name


@CLASSES
def test_constructor_takes_what_natives_takes(cls):
    """Every argument that the definitions give to the constructor, `bias` among them where this
    torch knows it."""
    for sample in module_samples(cls, torch.float64, True, gradient=False):
        made = sample.constructor_input
        ours, native = (c(*made.args, **made.kwargs) for c in (FUSED[cls], cls))
        assert list(ours.state_dict()) == list(native.state_dict())
        assert (ours.weight is None, ours.bias is None) == (
            native.weight is None,
            native.bias is None,
        )
