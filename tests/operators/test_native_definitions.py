"""PyTorch's own definitions of what its batch norm has to do: the inputs that its test suite gives
to nn.BatchNorm1d/2d/3d and to the functions, here given to both implementations.

The definitions live in torch.testing._internal and change with torch; the tests say so where one of
them is gone, rather than pass without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import bnorm_ext
from tests.common.cases import BOTH, DTYPES, Case, Results, accumulation_type, run, unit_roundoff
from tests.common.native_definitions import (
    CLASSES,
    FUNCTIONS,
    MODULES,
    OURS,
    TRAINING,
    assert_close,
    case_of_module,
    infos,
    module_samples,
    op_samples,
    pair,
)
from tests.common.twins import outcome


def test_definitions_are_there():
    assert MODULES.keys() == OURS.keys()
    for name in FUNCTIONS:
        assert infos(name), name


# ---- Modules ------------------------------------------------------------------------------------


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
        y, mean, rstd, _ = torch.ops.bnorm_ext.batch_norm_training(
            c.x, None, c.weight, c.bias, *buffers, None, c.momentum, c.eps
        )
        # Up to 5^3 values below 10 in float32 at least; 16-bit results round once more.
        u = max(unit_roundoff(dtype), unit_roundoff(accumulation_type(dtype)) * 100)
        for a, b in zip((y, mean[0], rstd), native, strict=True):
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
