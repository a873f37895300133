"""PyTorch's own definitions of what its batch norm has to do: the inputs that its test suite gives
to nn.BatchNorm1d/2d/3d and to the functions, and how near results for them have to be.

They live in torch.testing._internal and change with torch. Where one of them is gone, its test
fails or is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import bnorm_ext
from tests.common.cases import Case, Results, measure, per_channel, unit_roundoff

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


def assert_close(c: Case, ours: Results, native: Results) -> None:
    """Equal up to rounding: each is within 10 of the units that `cases` explains (samples hold
    few values; r is |mean|/std). A wrong rule is off by the values themselves."""
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


def error_samples(cls: type, dtype: torch.dtype, training: bool) -> list[Any]:
    info = MODULES[cls]
    function = getattr(info, "module_error_inputs_func", None)
    if function is None:
        pytest.skip("this torch defines no inputs of batch norm that are errors")
    return list(function(info, device="cpu", dtype=dtype, requires_grad=False, training=training))
