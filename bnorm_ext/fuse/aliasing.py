"""Which nodes of a graph may share memory, and which may change it in place."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.node import map_arg

from .._compat.modules import has_forward_hooks, has_hooks_at_forward
from ..modules import _BatchNormMixin
from .call import CHANGES_RESIDUAL, batch_norm_add_act

# Operations whose result is new memory. The result of any other may be a view of its arguments.
_FRESH_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip
_FRESH_FUNCTIONS = frozenset(
    {
        operator.add, operator.mul, operator.sub, operator.truediv, operator.neg, operator.matmul,
        torch.add, torch.mul, torch.sub, torch.cat, torch.stack, torch.matmul, torch.relu,
        torch.sigmoid, torch.tanh, torch.clone,
        F.linear, F.conv1d, F.conv2d, F.conv3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    }
)  # fmt: skip
_FRESH_METHODS = frozenset({"add", "mul", "sub", "div", "clone", "relu", "sigmoid", "mean", "sum"})
_IN_PLACE_OPERATORS = {getattr(operator, name) for name in (*inplace_methods, "setitem")}
_RESIDUAL, _ADDITION = 2, 3  # positions of these arguments of batch_norm_add_act
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type, type(torch.ops.aten.add.Tensor))
_KNOWN_PACKAGES = ("torch", "_operator", "builtins", "math")


def is_torchs_function(function: Callable[..., Any]) -> bool:
    module = getattr(function, "__module__", None)
    return module is None or module.split(".")[0] in _KNOWN_PACKAGES


def fresh(node: fx.Node, root: nn.Module) -> bool:
    """Whether the result of ``node`` is certain to share memory with nothing else."""
    if "out" in node.kwargs:
        return False
    if node.target is batch_norm_add_act:
        return node.args[_ADDITION] not in CHANGES_RESIDUAL
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        layer = isinstance(module, _FRESH_MODULES) and type(module).__module__.startswith(
            "torch.nn"
        )
        # Hooks may return anything.
        return (layer or isinstance(module, _BatchNormMixin)) and not has_forward_hooks(module)
    if node.op == "call_method":
        return node.target in _FRESH_METHODS
    return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def changed_by(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """The arguments that ``node`` may change in place."""
    if node.target is batch_norm_add_act:
        return [node.args[_RESIDUAL]] if node.args[_ADDITION] in CHANGES_RESIDUAL else []  # type: ignore[list-item]
    out = [value for name, value in node.kwargs.items() if name == "out"]
    nodes = [value for value in out if isinstance(value, fx.Node)]
    if _changes_first(node, root):
        map_arg(node.args[:1], nodes.append)  # the first argument may be a list of tensors
        nodes += node.all_input_nodes[:1]
    elif _may_change_any(node, root):
        nodes += node.all_input_nodes
    return nodes


def _changes_first(node: fx.Node, root: nn.Module) -> bool:
    target: Any = node.target
    if node.op == "call_method":
        return _is_in_place(target)
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(target), "inplace", False))
    if node.op != "call_function":
        return False
    if target in _IN_PLACE_OPERATORS or _is_in_place(getattr(target, "__name__", "")):
        return True
    try:
        arguments = inspect.signature(target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # torch's C functions have no signature
        return bool(node.kwargs.get("inplace"))
    return bool(arguments.get("inplace"))


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name[2:-2] in inplace_methods
    return name.endswith("_")


def _may_change_any(node: fx.Node, root: nn.Module) -> bool:
    """Whether ``node`` runs code that is not torch's."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        # Containers of torch, such as DataParallel, run modules that may be anybody's.
        theirs = type(module).__module__.startswith("torch.nn") and not any(module.children())
        return has_hooks_at_forward(module) or not (theirs or isinstance(module, _BatchNormMixin))
    if node.op != "call_function":
        return False
    # Operators tell by their schema. What else is no function may be an operator without one.
    if node.is_impure() or not isinstance(node.target, _FUNCTIONS):
        return True
    return not is_torchs_function(node.target)


class Aliases:
    """Which nodes of a graph may share memory: a union-find over the nodes."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        for node in inputs[1:]:
            self._join(node, inputs[0])
        for node in self.nodes:
            if not fresh(node, root):
                # An in-place operator returns its first argument.
                only_first = node.target in _IN_PLACE_OPERATORS or node.target == "add_"
                for argument in node.all_input_nodes[: 1 if only_first else None]:
                    self._join(node, argument)

    def _find(self, node: fx.Node) -> fx.Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._find(a), self._find(b)
        if a is not b:
            self._parent[a] = b

    def changed_between(
        self,
        node: fx.Node,
        after: fx.Node,
        before: fx.Node | None = None,
        but: fx.Node | None = None,
    ) -> fx.Node | None:
        """The first node after ``after`` and before ``before``, other than ``but``, that may change
        the memory of ``node``; None where there is none. Without ``before``: up to the end."""
        end = len(self.nodes) if before is None else self.position[before]
        same = self._find(node)
        for candidate in self.nodes[self.position[after] + 1 : end]:
            if candidate is not but and any(
                self._find(n) is same for n in changed_by(candidate, self.root)
            ):
                return candidate
        return None
