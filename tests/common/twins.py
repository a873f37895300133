"""Pairs of an own module and its native twin, and the comparison of what they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnorm_ext import modules

OURS = {1: modules.BatchNorm1d, 2: modules.BatchNorm2d, 3: modules.BatchNorm3d}
NATIVE = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS_LAZY = {1: modules.LazyBatchNorm1d, 2: modules.LazyBatchNorm2d, 3: modules.LazyBatchNorm3d}
NATIVE_LAZY = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}

# ``bias=`` came to torch's own modules later than to this package's oldest supported torch; a
# weight without bias can be had everywhere by setting the attribute to None.
HAS_BIAS_ARGUMENT = "bias" in inspect.signature(nn.BatchNorm2d).parameters
NO_BIAS: list[dict[str, Any]] = [{"bias": False}] if HAS_BIAS_ARGUMENT else []

# Input shapes per dimensionality, all with 5 channels; at most M = 72 values per channel.
SHAPES = {1: (6, 5), 2: (4, 5, 3, 6), 3: (2, 5, 3, 2, 4)}

# Semantics are compared in float64, where a wrong rule cannot hide behind rounding. Two correct
# implementations differ by the order of summation and a few roundings, at most M * u * scale
# = 72 * 1.1e-16 * 50 < 1e-12 for the magnitudes here (inputs, gradients and statistics below 50).
# A NaN (a negative momentum can make a running variance negative) must be one on both sides.
FLOAT64: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12, "equal_nan": True}


def twins(dims: int, channels: int = 5, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our module and the native one, same random parameters and running statistics, float64."""
    kwargs.setdefault("dtype", torch.float64)
    native = NATIVE[dims](channels, **kwargs)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.uniform_(-2, 2)
        if native.running_mean is not None:
            native.running_mean.uniform_(-2, 2)
            native.running_var.uniform_(0.5, 3)
    ours = OURS[dims](channels, **kwargs)
    ours.load_state_dict(native.state_dict(), strict=True)
    return ours, native


def step(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """One forward and backward; everything that it changed or made, by name."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    seen = {"y": y.detach(), "dx": x.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            seen[f"d{name}"] = parameter.grad.clone()
    for name, buffer in module.named_buffers():
        seen[name] = buffer.clone()
    return seen


def assert_same(ours: dict[str, Tensor], native: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == native.keys()
    for name in native:
        torch.testing.assert_close(
            ours[name],
            native[name],
            msg=lambda text, name=name: f"{name}: {text}",
            **(tolerance or FLOAT64),
        )


def outcome(call: Callable[[], Any]) -> tuple[type[BaseException], str] | None:
    """Type and text of the exception that ``call`` raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
