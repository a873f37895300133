"""PyTorch's own definitions of what its batch norm has to do: the inputs that its test suite gives
to nn.BatchNorm1d/2d/3d and to the functions, here given to both implementations.

The definitions live in torch.testing._internal and change with torch; the tests say so where one of
them is gone, rather than pass without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import bnorm_ext
from tests.common.cases import (
    BOTH,
    DTYPES,
    Case,
    Results,
    accumulation_type,
    measure,
    per_channel,
    run,
    unit_roundoff,
)
from tests.common.twins import outcome

MODULES = {info.module_cls: info for info in module_db if info.module_cls in (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}  # fmt: skip
OURS = {
    nn.BatchNorm1d: bnorm_ext.BatchNorm1d,
    nn.BatchNorm2d: bnorm_ext.BatchNorm2d,
    nn.BatchNorm3d: bnorm_ext.BatchNorm3d,
}
FUNCTIONS = ["nn.functional.batch_norm", "native_batch_norm"]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
CLASSES = pytest.mark.parametrize("cls", OURS, ids=lambda c: c.__name__)


def infos(name: str) -> list[Any]:
    return [info for info in op_db if info.name == name]


def test_definitions_are_there():
    assert MODULES.keys() == OURS.keys()
    for name in FUNCTIONS:
        assert infos(name), name


def assert_close(c: Case, ours: Results, native: Results) -> None:
    """Equal up to rounding: each is within 10 of the units that `cases` explains (samples
    hold few values; r is |mean|/std). A wrong rule is off by the values themselves."""
    assert ours.keys() == native.keys()
    m = measure(c) if c.x.numel() else None
    for name, t in native.items():
        assert (ours[name].shape, ours[name].dtype) == (t.shape, t.dtype), name
        assert ours[name].stride() == t.stride(), name
        if m is None or name not in m.scale:
            assert torch.equal(ours[name], t), name
            continue
        allowed = m.scale[name] * 20 * (1 + m.ratio) * unit_roundoff(t.dtype)
        allowed += torch.finfo(t.dtype).smallest_normal
        off = per_channel(ours[name].double() - t.double())
        assert torch.equal(ours[name].isnan(), t.isnan()), name
        assert not (off > allowed).any(), (name, off / allowed)


# ---- Modules ------------------------------------------------------------------------------------


def module_samples(cls: type, dtype: torch.dtype, training: bool, gradient: bool) -> Iterator[Any]:
    info = MODULES[cls]
    torch.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=gradient, training=training
    )
    count = 0
    for sample in samples:
        count += 1
        yield sample
    assert count > 4


def pair(cls: type, sample: Any, dtype: torch.dtype, training: bool) -> list[nn.Module]:
    made = sample.constructor_input
    native = cls(*made.args, **made.kwargs).to(dtype).train(training)
    with torch.no_grad():
        for t in (*native.parameters(), *native.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 2)
    ours = OURS[cls](*made.args, **made.kwargs).to(dtype).train(training)
    ours.load_state_dict(native.state_dict(), strict=True)
    assert repr(ours) == repr(native)
    return [ours, native]


def case_of_module(module: Any, x: Tensor, dy: Tensor) -> Case:
    """What a first call of the module computes."""
    vectors = [
        t if t is None else t.detach().clone()
        for t in (module.running_mean, module.running_var, module.weight, module.bias)
    ]
    batch_statistics = module.training or module.running_mean is None
    momentum = 1.0 if module.momentum is None else module.momentum
    return Case(x.detach(), dy, *vectors, batch_statistics, momentum, module.eps)


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@CLASSES
def test_module_samples(cls, dtype, training):
    for sample in module_samples(cls, dtype, training, gradient=True):
        results = []
        (x,) = sample.forward_input.args
        dy = torch.linspace(-1, 2, x.numel(), dtype=dtype).view(x.shape)
        modules = pair(cls, sample, dtype, training)
        c = case_of_module(modules[0], x, dy)
        for module in modules:
            leaf = x.detach().clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            assert leaf.grad is not None
            found = {"y": y.detach(), "dx": leaf.grad, **dict(module.named_buffers())}
            results.append(found | {f"d{n}": p.grad for n, p in module.named_parameters()})
        assert_close(c, *results)


@TRAINING
@CLASSES
def test_module_samples_gradcheck(cls, training):
    for sample in module_samples(cls, torch.float64, training, gradient=True):
        module, _ = pair(cls, sample, torch.float64, training)
        names = [n for n, _ in module.named_parameters()]

        def forward(x: Tensor, *values: Tensor, module=module, names=names) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        leaves = (sample.forward_input.args[0], *module.parameters())
        assert torch.autograd.gradcheck(forward, leaves)
        assert torch.autograd.gradgradcheck(forward, leaves)


# ---- Functions ----------------------------------------------------------------------------------


def op_samples(name: str, dtype: torch.dtype) -> list[Case]:
    found = []
    for info in infos(name):
        for samples in (info.sample_inputs, info.reference_inputs):
            torch.manual_seed(0)
            for s in samples("cpu", dtype):
                names = ["running_mean", "running_var", "weight", "bias"]
                if name == "native_batch_norm":
                    names = ["weight", "bias", *names[:2], "training", "momentum", "eps"]
                given = dict(zip(names, s.args, strict=False)) | s.kwargs
                given.setdefault("training", False)
                dy = torch.linspace(-1, 2, s.input.numel(), dtype=dtype).view(s.input.shape)
                found.append(Case(s.input, dy, **given))
    assert len(found) > 8
    return found


def collect(results: list[Results], function: Callable[..., Tensor], c: Case) -> None:
    results.append(run(function, c))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_function_samples(dtype):
    for c in op_samples("nn.functional.batch_norm", dtype):
        results: list[Results] = []
        errors = [outcome(partial(collect, results, f, c)) for f in BOTH.values()]
        assert errors[0] == errors[1], c
        if errors[0] is None:
            assert_close(c, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_operator_samples(dtype):
    """native_batch_norm returns what our operator returns: y, mean and rstd."""
    seen = 0
    for c in op_samples("native_batch_norm", dtype):
        if not c.training:
            continue
        seen += 1
        buffers = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
        native = torch.native_batch_norm(
            c.x, c.weight, c.bias, c.running_mean, c.running_var, True, c.momentum, c.eps
        )
        ours = torch.ops.bnorm_ext.batch_norm_training(
            c.x, None, c.weight, c.bias, *buffers, None, c.momentum, c.eps
        )
        # Up to 5^3 values below 10 in float32 at least; 16-bit results round once more.
        u = max(unit_roundoff(dtype), unit_roundoff(accumulation_type(dtype)) * 100)
        for a, b in zip(ours[:3], native, strict=True):
            torch.testing.assert_close(
                a.double(), b.double(), rtol=4 * u, atol=40 * u, equal_nan=True
            )
    assert seen > 3


def test_function_samples_gradcheck():
    for c in op_samples("nn.functional.batch_norm", torch.float64):
        if c.x.numel() == 0:
            continue
        given = [t for t in (c.x, c.weight, c.bias) if t is not None]
        leaves = [t.clone().requires_grad_() for t in given]

        def forward(x: Tensor, *parameters: Tensor, c=c) -> Tensor:
            # Fresh buffers: the function must be one of its arguments alone.
            buffers = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
            return bnorm_ext.batch_norm(x, *buffers, *parameters, training=c.training, eps=c.eps)

        assert torch.autograd.gradcheck(forward, leaves)
        assert torch.autograd.gradgradcheck(forward, leaves)
