"""The one call that a fused graph makes where there were a batch norm, an addition and an
activation.

It is given the modules as they are when it runs. Where they are what they were when the graph was
made, or others that fit as well, it takes the fused operator; else it does what the separate calls
do: with hooks, with another activation, with a batch norm of another class, with shapes that
broadcast. So a graph stays right whatever becomes of the modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._compat.modules import has_global_module_hooks, is_hooked
from ..activations import alike, compose
from ..modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, is_ours
from ..modules_act import _BatchNormActMixin, activation_of

#: The ways to add, as they are written; they differ in what they change, and in their errors.
ADDITIONS: dict[str, Callable[[Any, Any], Any]] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": operator.iadd,
    "r += y": lambda y, r: operator.iadd(r, y),
    "torch.add(y, r)": torch.add,
    "torch.add(r, y)": lambda y, r: torch.add(r, y),
    "y.add(r)": lambda y, r: y.add(r),
    "r.add(y)": lambda y, r: r.add(y),
    "y.add_(r)": lambda y, r: y.add_(r),
    "r.add_(y)": lambda y, r: r.add_(y),
}
CHANGES_RESIDUAL = ("r += y", "r.add_(y)")

_PLAIN = frozenset({BatchNorm1d, BatchNorm2d, BatchNorm3d})


def batch_norm_add_act(
    bn: nn.Module,
    input: Tensor,
    residual: Any = None,
    addition: str = "none",
    act: nn.Module | str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(bn(input) + residual)``.

    Args:
        bn: a batch norm, or whatever has taken its place.
        input: what the batch norm is called with.
        residual: what is added; any value that the addition takes.
        addition: how they are added, one of ``ADDITIONS`` (``y`` is ``bn(input)``, ``r`` the
            residual); "none"; or "bn(x, r)" for a batch norm that adds itself.
        act: a module; the name of an activation that was called as a function; or None.
        negative_slope: of "leaky_relu", where ``act`` is a name.
    """
    name, slope = _activation(act, negative_slope)
    if (
        name is not None
        and _is_plain(bn)
        and (addition == "none" or alike(input, residual))
        and not has_global_module_hooks()
    ):
        return bn._normalise(input, residual, name, slope)
    return _separate(bn, input, residual, addition, act, negative_slope)


def _activation(act: nn.Module | str | None, negative_slope: float) -> tuple[str | None, float]:
    """Name and slope of the activation as it is now; None where it is none of ours."""
    if act is None or isinstance(act, str):
        return act or "identity", negative_slope
    return activation_of(act)


def own_act(module: nn.Module) -> tuple[str | None, float]:
    """What a batch norm does to its output; None where that is none of the known activations."""
    return module.activation() if isinstance(module, _BatchNormActMixin) else ("identity", 0.01)


def _is_plain(bn: nn.Module) -> bool:
    if type(bn) not in _PLAIN and not (is_ours(bn) and own_act(bn)[0] == "identity"):
        return False
    return not is_hooked(bn)


def _separate(
    bn: nn.Module,
    input: Tensor,
    residual: Any,
    addition: str,
    act: nn.Module | str | None,
    negative_slope: float,
) -> Tensor:
    y = bn(input, residual) if addition == "bn(x, r)" else bn(input)
    add = ADDITIONS.get(addition)
    if add is not None:
        y = add(y, residual)
    if act is None:
        return y
    return compose(y, None, act, negative_slope) if isinstance(act, str) else act(y)
