"""A graph as a function that can be copied and pickled."""

from __future__ import annotations

import itertools
import linecache
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

#: Names that torch.fx defines for the code that it generates. An argument would hide them.
CODE_NAMES = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})

_numbers = itertools.count()
_OPERATORS = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))


@dataclass(frozen=True)
class _Result:
    """Refers to a node of a pickled graph by its position."""

    number: int


@dataclass(frozen=True)
class _Named:
    """Refers to what cannot be pickled itself: the operator ``torch.ops.<path>``, or a function
    that is found under this name but was defined under another one, as ``F.max_pool2d``."""

    path: str
    module: str = "torch.ops"


class Program:
    """A graph compiled to a function ``run(root, *modules, *inputs)``.

    It is immutable and holds neither tensors nor modules, so copies of a model share it.
    """

    def __init__(self, graph: fx.Graph, paths: Iterable[str]) -> None:
        """``paths``: of all modules inside the root; the graph uses some of them."""
        self.graph = graph
        self.code: str = graph.python_code(root_module="self").src
        known = set(paths)
        nodes = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
        named = [str(node.target) for node in nodes]
        #: Paths of the modules that ``run`` takes as arguments.
        self.modules = tuple(dict.fromkeys(path for path in named if path in known))
        code = _with_modules(graph, self.modules).python_code(root_module="self")
        # With a unique file name in linecache, tracebacks and debuggers show the generated code.
        name = f"<bnorm_ext fused graph {next(_numbers)}>"
        linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
        scope: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, name, "exec"), scope)
        self.run: Callable[..., Any] = scope["forward"]
        #: Names of the inputs, in order.
        self.inputs = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        number: dict[fx.Node, Any] = {node: _Result(i) for i, node in enumerate(self.graph.nodes)}
        rows = [
            (
                node.op,
                node.name,
                _referred(node.target),
                map_arg(node.args, number.__getitem__),
                map_arg(node.kwargs, number.__getitem__),
            )
            for node in self.graph.nodes
        ]
        return _load, (rows, self.modules)


def _with_modules(graph: fx.Graph, modules: tuple[str, ...]) -> fx.Graph:
    """``graph`` with its modules as additional inputs, before its own. Looking them up by name
    would cost as much host time as a small layer."""
    made = fx.Graph()
    inputs = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    # Numbered, because the name of a module need not be a Python identifier.
    free = (name for i in itertools.count() if (name := f"module_{i}") not in inputs)
    names = itertools.islice(free, len(modules))
    place = {path: made.placeholder(name) for path, name in zip(modules, names, strict=True)}
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target not in place or node.op not in ("call_module", "get_attr"):
            copies[node] = made.node_copy(node, copies.__getitem__)
        elif node.op == "get_attr":
            copies[node] = place[node.target]
        else:
            args = map_arg(node.args, copies.__getitem__)
            kwargs = map_arg(node.kwargs, copies.__getitem__)
            arguments = (place[node.target], *args)
            copies[node] = made.call_method("__call__", arguments, kwargs)
    return made


def _referred(target: Any) -> Any:
    if isinstance(target, _OPERATORS):
        return _Named(str(target))
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None)
    if "<locals>" in getattr(target, "__qualname__", ""):
        return _Named(name, str(module))
    return target


def _load(rows: list[tuple[Any, ...]], modules: tuple[str, ...]) -> Program:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def found(value: Any) -> Any:
        if isinstance(value, _Result):
            return nodes[value.number]
        if type(value) in (list, tuple):
            return type(value)(found(v) for v in value)
        if type(value) is dict:
            return {key: found(v) for key, v in value.items()}
        if type(value) is slice:
            return slice(found(value.start), found(value.stop), found(value.step))
        return value

    for op, name, target, args, kwargs in rows:
        if isinstance(target, _Named):
            holder = torch.ops if target.module == "torch.ops" else sys.modules[target.module]
            target = operator.attrgetter(target.path)(holder)
        args, kwargs = found(tuple(args)), found(dict(kwargs))
        nodes.append(graph.create_node(op, target, args, kwargs, name=name))
    return Program(graph, modules)
