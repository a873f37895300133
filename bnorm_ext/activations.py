"""The activations that can be fused with batch normalisation, by name, class or module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How callers give an activation: its name in ``torch.nn.functional``, a module, a class of
#: modules, or None for the identity.
Activation = str | nn.Module | type[nn.Module] | None

NAMES = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish")
_KNOWN = frozenset(NAMES)
#: Piecewise linear: one bit of an element tells backward the derivative.
PIECEWISE = ("relu", "relu6", "leaky_relu")

# For exact types only: a subclass may do something else.
MODULE_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


def name_of(module: nn.Module) -> str | None:
    """Name of the activation that a module is; None if it is none of those that can be fused."""
    settings: Any = module
    name = MODULE_NAMES.get(type(module))
    # torch's ReLU6 is a Hardtanh, and takes its limits from the attributes of one.
    if name == "relu6" and (settings.min_val != 0 or settings.max_val != 6):
        return None
    if name == "leaky_relu" and not isinstance(settings.negative_slope, (int, float)):
        return None
    return name


def resolve(act: Activation, negative_slope: float) -> tuple[str, float]:
    """Name and slope of an activation given by name, module class or module.

    The slope of an ``nn.LeakyReLU`` instance takes precedence over ``negative_slope``.

    Raises:
        ValueError: it is not one of those that can be fused.
    """
    if act is None:
        return "identity", negative_slope
    if isinstance(act, str):
        if act in _KNOWN:
            return act, negative_slope
    elif isinstance(act, nn.Module):
        if type(act) is nn.LeakyReLU:
            return "leaky_relu", act.negative_slope
        name = name_of(act)
        if name is not None:
            return name, negative_slope
        if type(act) not in MODULE_NAMES:
            act = type(act)
    elif act in MODULE_NAMES:
        return MODULE_NAMES[act], negative_slope
    given = act.__name__ if isinstance(act, type) else repr(act)
    if isinstance(act, nn.ReLU6):
        given = f"ReLU6 from {act.min_val} to {act.max_val}"
    raise ValueError(
        f"unknown activation {given}: expected None or one of {', '.join(NAMES)}, "
        f"or one of the modules {', '.join(cls.__name__ for cls in MODULE_NAMES)}"
    )


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def compose(y: Tensor, residual: Tensor | None, name: str, negative_slope: float) -> Tensor:
    """``act(y + residual)`` by torch's own operations."""
    if residual is not None:
        y = torch.add(y, residual)
    if name == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    return _FUNCTIONS[name](y)


def addable(input: Tensor, residual: Any) -> bool:
    """Whether they can be added without broadcasting and type promotion."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raises RuntimeError where torch's own addition would broadcast or promote, or raise."""
    if not addable(input, residual):
        raise RuntimeError(
            f"residual must be like the input (shape {list(input.shape)}, dtype {input.dtype} on "
            f"{input.device}), but got shape {list(residual.shape)}, dtype {residual.dtype} on "
            f"{residual.device}"
        )
