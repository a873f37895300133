"""A module that runs a graph and keeps everything else that it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn


class FusedModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that keeps what torch's own drops when it is made, copied or
    pickled: submodules and parameters that the graph does not use, their order, hooks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModule:
        result = FusedModule.__new__(FusedModule)
        memo[id(self)] = result
        for name, value in vars(self).items():
            if name != "_graph":
                vars(result)[name] = copy.deepcopy(value, memo)
        result.graph = copy.deepcopy(self.graph)
        return result

    def __copy__(self) -> FusedModule:
        result = FusedModule.__new__(FusedModule)
        vars(result).update({name: v for name, v in vars(self).items() if name != "_graph"})
        result.graph = copy.deepcopy(self.graph)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        state = {name: value for name, value in vars(self).items() if name != "_graph"}
        return _unpickle, (rebuild, arguments, state)


def _unpickle(
    rebuild: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], state: dict[str, Any]
) -> FusedModule:
    result = FusedModule.__new__(FusedModule)
    vars(result).update(state)
    result.graph = rebuild(*arguments).graph
    return result


def run_graph(module: nn.Module, graph: fx.Graph) -> None:
    """Makes ``module`` a :class:`FusedModule` that runs ``graph``; it stays the same object, so
    that hooks, attributes and references to it stay valid."""
    made = FusedModule(module, graph, type(module).__name__)
    for name, value in vars(made).items():
        vars(module).setdefault(name, value)
    module.__class__ = type(made)
    module.graph = graph  # type: ignore[assignment]  # a property of the class it now has


def dissolve(module: nn.Module) -> None:
    """Makes ``module``, whose forward has gone into a graph, a plain container: as in every
    GraphModule, calling it is an error. Its own forward would be wrong now."""
    module.__class__ = nn.Module
