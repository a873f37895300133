"""Recognising activations and additions in a graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._compat.modules import hooks_of
from ..activations import name_of
from .aliasing import is_torchs_function

# How an addition is written, as in the keys of ``call.ADDITIONS``, with its operands left open.
_ADD_FUNCTIONS: dict[Any, str] = {
    operator.add: "{} + {}",
    torch.add: "torch.add({}, {})",
    operator.iadd: "{} += {}",
}
_ADD_METHODS: dict[Any, str] = {
    "add": "{}.add({})",
    "__add__": "{} + {}",
    "__radd__": "{1} + {0}",
    "add_": "{}.add_({})",
    "__iadd__": "{} += {}",
}
_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS: dict[Any, str] = {"relu": "relu", "relu_": "relu"}
_DEFAULT_SLOPE = 0.01


@dataclass(frozen=True)
class Act:
    """An activation in a graph."""

    node: fx.Node
    name: str
    negative_slope: float
    refusal: str | None  #: why it cannot be fused


@dataclass(frozen=True)
class Addition:
    """An addition in a graph, one operand of which is the output of a batch norm."""

    node: fx.Node
    residual: Any  #: the other operand: a node, or a number
    kind: str  #: see ``call.batch_norm_add_act``
    refusal: str | None  #: why it cannot be fused


def as_act(node: fx.Node, root: nn.Module, operand: fx.Node) -> Act | None:
    """The activation that ``node`` applies to ``operand``; None if ``node`` is something else."""
    arguments = {**dict(zip(("input", "negative_slope"), node.args, strict=False)), **node.kwargs}
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        name = name_of(module)
        if name is None or name == "identity":
            return None
        reason = None
        if hooks_of(module):
            reason = f"the activation {node.target} has {hooks_of(module)}"
        elif "forward" in vars(module):
            reason = f"the forward of the activation {node.target} was replaced on the instance"
        elif not is_torchs_function(type(module).forward):
            reason = f"the forward of {type(module).__name__} was replaced"
        slope = getattr(module, "negative_slope", _DEFAULT_SLOPE)
    else:
        names = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
        name = names.get(node.target)
        if name is None:
            return None
        reason = None
        slope = _DEFAULT_SLOPE
        if name == "leaky_relu":
            slope = arguments.get("negative_slope", slope)
    if arguments.get("input", node.kwargs.get("x")) is not operand:
        return None
    if isinstance(slope, fx.Node):
        reason = "the slope of the activation is computed"
        slope = _DEFAULT_SLOPE
    return Act(node, name, float(slope), reason)


def as_addition(node: fx.Node, operand: fx.Node) -> Addition | None:
    """The addition that ``node`` does to ``operand``; None if ``node`` is something else."""
    forms: dict[Any, str] = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}.get(
        node.op, {}
    )
    form = forms.get(node.target)
    if form is None:
        return None
    named = dict(node.kwargs)
    positional = list(node.args)
    first = positional.pop(0) if positional else named.pop("input", None)
    second = positional.pop(0) if positional else named.pop("other", None)
    alpha = named.pop("alpha", 1)
    residual = second if first is operand else first
    kind = form.format(*("y", "r") if first is operand else ("r", "y"))
    refusal = None
    if not (isinstance(alpha, int | float) and alpha == 1):
        refusal = f"the addition multiplies by alpha={alpha}"
    elif positional or named:
        refusal = f"the addition has further arguments ({', '.join(named) or 'positional'})"
    elif not isinstance(residual, fx.Node):
        refusal = f"what is added is no tensor but {residual!r}, which broadcasts"
    elif residual is operand:
        refusal = "its output has several users"
    elif residual.op == "get_attr":
        refusal = f"what is added is the tensor {residual.target} of the module, which broadcasts"
    return Addition(node, residual, kind, refusal)


def remove_identities(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Removes calls of ``nn.Identity`` from the graph; returns the paths of these modules."""
    removed = set()
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = root.get_submodule(node.target)
            if (
                type(module) is nn.Identity
                and not hooks_of(module)
                and "forward" not in vars(module)
                and isinstance(node.args[0], fx.Node)
            ):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                removed.add(str(node.target))
    return removed
