"""The call that replaces a batch norm, an addition and an activation in a fused graph.

It gets the modules as arguments, so it sees them as they are when it runs. If they can be fused, it
calls the fused operator. Otherwise (hooks, an unknown activation, a batch norm of another class,
shapes that broadcast) it makes the separate calls. So a graph stays right if modules are replaced
later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .._compat.modules import has_global_module_hooks, is_hooked
from ..activations import addable, compose
from ..functional import has_own_functions
from ..modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormMixin, is_ours
from ..modules_act import _BatchNormActMixin, activation_of

#: Additions of ``y``, the output of the batch norm, and ``r``, the residual, by how they are
#: written. They differ in which tensor they change, and in their errors.
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

# Tested first, because it costs least.
# A tuple, because Dynamo of torch 2.8 does not look for a class in a frozenset.
_WITHOUT_ACT = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


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
        bn: the batch norm, or the module that has replaced it.
        input: its input.
        residual: any value that the addition takes.
        addition: how the residual is added: a key of ``ADDITIONS``, "none", or "bn(x, r)" where the
            batch norm takes the residual as its second argument.
        act: a module, the name of an activation that was called as a function, or None.
        negative_slope: of "leaky_relu"; used if ``act`` is a name.
    """
    name, slope = _activation(act, negative_slope)
    if (
        name is not None
        and _is_fusible(bn)
        and (addition == "none" or (addable(input, residual) and not has_own_functions(residual)))
        and not has_global_module_hooks()
    ):
        return bn._normalise(input, residual, name, slope)
    return _separate(bn, input, residual, addition, act, negative_slope)


def _activation(act: nn.Module | str | None, negative_slope: float) -> tuple[str | None, float]:
    """Name and slope of the activation; None as name if it cannot be fused."""
    if act is None or isinstance(act, str):
        return act or "identity", negative_slope
    return activation_of(act)


def own_act(module: nn.Module) -> tuple[str | None, float]:
    """Name and slope of the activation that a batch norm applies itself; None as name if that is
    none of the known ones."""
    return module.activation() if isinstance(module, _BatchNormActMixin) else ("identity", 0.01)


def _is_fusible(bn: nn.Module) -> TypeGuard[_BatchNormMixin]:
    """Whether it is a batch norm of this package with neither an activation nor hooks."""
    if type(bn) not in _WITHOUT_ACT and not (is_ours(bn) and own_act(bn)[0] == "identity"):
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
    y: Tensor = bn(input, residual) if addition == "bn(x, r)" else bn(input)
    add = ADDITIONS.get(addition)
    if add is not None:
        y = add(y, residual)
    if act is None:
        return y
    z: Tensor = compose(y, None, act, negative_slope) if isinstance(act, str) else act(y)
    return z
