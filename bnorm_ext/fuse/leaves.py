"""Which modules a graph calls, instead of containing what their forward does."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import fx, nn

from .._compat.modules import has_own_call, hooks_of, is_compiled
from ..modules import is_ours
from .bytecode import asks_for_types, enclosing_cells, looked_up, may_return_none, references
from .state import is_library

_MAX_FUNCTIONS = 300


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer or container of torch, or a batch norm of this package."""
    return is_ours(module) or fx.Tracer().is_leaf_module(module, "")


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls the module: it is a layer, or its call does more than its forward."""
    return (
        is_layer(module)
        or hooks_of(module) is not None
        or is_compiled(module) is not None
        or "forward" in vars(module)
        or has_own_call(type(module))
    )


def asks_for_exact_types(module: nn.Module) -> bool:
    """Whether the forward of the module, or a function or method that it names, asks for the exact
    class of something. It might be that of a module inside."""
    cls = type(module)
    functions: list[Any] = [cls.forward]
    seen: set[types.CodeType] = set()
    while functions and len(seen) < _MAX_FUNCTIONS:
        function = functions.pop()
        # Statically: it may be any object that code names, with a `__getattr__` of its own.
        function = inspect.getattr_static(function, "__wrapped__", function)
        if not isinstance(function, types.FunctionType) or is_library(function.__module__):
            continue
        functions += [cell.cell_contents for _, cell in enclosing_cells(function)]
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            if code in seen:
                continue
            seen.add(code)
            if asks_for_types(code):
                return True
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            functions += [getattr(cls, name, None) for name in code.co_names]
            named = references(code, function.__globals__, {})
            functions += [looked_up(holder, name) for holder, name in named]
    return False


def may_be_none(node: fx.Node, root: nn.Module) -> bool:
    """Whether a value in the graph of ``root`` may be None, or may be made of one: the function
    that asks may have gone on with it."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            code = getattr(type(module).forward, "__code__", None)
            if "forward" in vars(module) or code is None:
                return True
            if not is_layer(module) and may_return_none(code):
                return True
        elif node.op == "call_method" and node.target in ("get", "pop", "setdefault"):
            return True  # of a dictionary
        elif node.target is getattr and node.args[1] in ("grad", "grad_fn", "names"):
            return True
        elif node.op in ("call_method", "call_function"):
            nodes += node.all_input_nodes
    return False
