"""The rest of PyTorch's own definitions of batch norm: inputs that are errors, dtypes, forward
mode, inputs of other strides, and the operators behind the functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum

import bnorm_ext
from tests.common.cases import DTYPES, FORMATS, Case, run
from tests.common.native_definitions import (
    CLASSES,
    OURS,
    TRAINING,
    assert_close,
    case_of_module,
    error_samples,
    infos,
    module_samples,
    op_samples,
    pair,
)
from tests.common.twins import outcome

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "nn.functional.batch_norm"


# ---- Errors and dtypes --------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@CLASSES
def test_module_errors(cls, dtype, training):
    """Native's type and text for both; nothing changed."""
    samples = error_samples(cls, dtype, training)
    assert len(samples) > 1
    for sample in samples:
        seen = []
        made, given = (
            sample.module_error_input.constructor_input,
            sample.module_error_input.forward_input,
        )
        for module_cls in (OURS[cls], cls):
            construct = partial(module_cls, *made.args, **made.kwargs)
            if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                seen.append(outcome(construct))
                continue
            module = construct().to(dtype).train(training)
            before = {n: t.clone() for n, t in module.state_dict().items()}
            seen.append(outcome(partial(module, *given.args, **given.kwargs)))
            if module_cls is OURS[cls]:
                for name, tensor in module.state_dict().items():
                    assert torch.equal(tensor, before[name]), name
        assert seen[0] == seen[1]
        if training:  # what the definition says; evaluation may take it, and native decides
            with pytest.raises(sample.error_type, match=sample.error_regex):
                raise seen[0][0](seen[0][1])


@pytest.mark.filterwarnings("ignore:.*support is experimental:UserWarning")
@TRAINING
def test_dtypes(training):
    """Ours takes what the definition names, and nothing else."""
    named = {dtype for info in infos(NAME) for dtype in info.dtypes}
    assert set(DTYPES) == named
    every = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    taken = set()
    for dtype in every:
        try:
            x = torch.ones(4, 3, 2).to(dtype)
            buffers = torch.zeros(3).to(dtype), torch.ones(3).to(dtype)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # nobody has tensors of this dtype
        if outcome(partial(bnorm_ext.batch_norm, x, *buffers, training=training)) is None:
            taken.add(dtype)
    assert taken == named


# ---- Forward mode -------------------------------------------------------------------------------


def bound(c: Case) -> tuple[Any, list[Tensor]]:
    """A function of the differentiable inputs, and these."""
    names = [n for n in ("x", "weight", "bias") if getattr(c, n) is not None]
    leaves = [getattr(c, n).detach().clone().requires_grad_() for n in names]

    def forward(*given: Tensor) -> Tensor:
        buffers = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
        d = dict(zip(names, given, strict=True))
        return bnorm_ext.batch_norm(
            d["x"], *buffers, d.get("weight"), d.get("bias"), c.training, c.momentum, c.eps
        )

    return forward, leaves


def test_function_samples_in_forward_mode():
    """What the definition says is supported: forward mode, and forward over reverse."""
    info = infos(NAME)[0]
    assert info.supports_forward_ad
    assert info.supports_fwgrad_bwgrad
    for c in op_samples(NAME, torch.float64):
        if c.x.numel() == 0:
            continue
        forward, leaves = bound(c)
        assert gradcheck(forward, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(forward, leaves, check_fwd_over_rev=True, fast_mode=True)


# ---- Other strides ------------------------------------------------------------------------------


def strided(t: Tensor | None) -> Tensor | None:
    """The same values in every second place of a larger tensor, as the definitions' own
    ``noncontiguous`` gives them."""
    if t is None or t.numel() < 2:
        return t
    wide = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0].detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_function_samples_of_other_strides(dtype):
    from torch.nn.functional import batch_norm as native

    for c in op_samples(NAME, dtype):
        names = ("x", "dy", "running_mean", "running_var", "weight", "bias")
        spread = c.but(**{n: strided(getattr(c, n)) for n in names})
        assert c.x.numel() < 2 or not spread.x.is_contiguous()
        results: list[Any] = []

        def collect(function, results=results, spread=spread):
            results.append(run(function, spread))

        errors = [outcome(partial(collect, f)) for f in (bnorm_ext.batch_norm, native)]
        assert errors[0] == errors[1]
        if errors[0] is None:
            assert_close(spread, *results)


LAYOUTS = {nn.BatchNorm2d: "channels_last", nn.BatchNorm3d: "channels_last_3d"}


@TRAINING
@pytest.mark.parametrize("cls", LAYOUTS, ids=lambda c: c.__name__)
def test_module_samples_in_channels_last(cls, training):
    for sample in module_samples(cls, torch.float64, training, gradient=True):
        (x,) = sample.forward_input.args
        results = []
        modules = pair(cls, sample, torch.float64, training)
        dy = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
        c = case_of_module(modules[0], x, dy)
        for module in modules:
            leaf = x.detach().to(memory_format=FORMATS[LAYOUTS[cls]]).requires_grad_()
            y = module(leaf)
            y.backward(dy)
            found = {"y": y.detach(), "dx": leaf.grad, **dict(module.named_buffers())}
            results.append(found | {f"d{n}": p.grad for n, p in module.named_parameters()})
        assert_close(c, *results)


# ---- Operators ----------------------------------------------------------------------------------


def _native_batch_norm(x, mean, var, weight, bias, training, momentum, eps):
    return torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


def _legit(x, mean, var, weight, bias, training, momentum, eps):
    statistics = () if mean is None else (mean, var)
    legit = torch._native_batch_norm_legit
    return legit(x, weight, bias, *statistics, training, momentum, eps)[0]


def _with_update(x, mean, var, weight, bias, training, momentum, eps):
    update = torch.ops.aten._batch_norm_with_update.default  # in no namespace of torch
    return update(x, weight, bias, mean, var, momentum, eps)[0]


# Each operator as F.batch_norm is called, and what its samples consist of.
OPERATORS: dict[str, tuple[Any, list[str]]] = {
    "native_batch_norm": (
        _native_batch_norm,
        ["weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"],
    ),
    "_native_batch_norm_legit": (
        _legit,
        ["weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"],
    ),
    "_batch_norm_with_update": (
        _with_update,
        ["weight", "bias", "running_mean", "running_var", "momentum", "eps"],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_samples_through_the_function(name, dtype):
    """The function gives what each of native's operators gives for its own samples."""
    operator, names = OPERATORS[name]
    seen = 0
    for info in infos(name):
        torch.manual_seed(0)
        for sample in info.sample_inputs("cpu", dtype):
            assert not sample.kwargs
            # Without running statistics these two are left out.
            without = len(sample.args) == len(names) - 2
            present = [n for n in names if not (without and n.startswith("running"))]
            given = dict(zip(present, sample.args, strict=True))
            dy = torch.linspace(-1, 2, sample.input.numel(), dtype=dtype).view(sample.input.shape)
            c = Case(sample.input, dy, **given)
            assert_close(c, run(bnorm_ext.batch_norm, c), run(operator, c))
            seen += 1
    assert seen > 3
