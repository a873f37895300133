"""Tracing a module by ``torch.fx`` such that its graph does what the module does, in both modes.

Tracing runs ``forward`` once and keeps what it did to the input; what Python decided meanwhile is
frozen. Modules for which that is wrong are found here and kept as single calls in the graph, with
their own forward.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._fuse_guards import Unfit, autograd_modes, contexts_refused, random_states, unchanged
from .modules import _PACKAGE, _OneCallForward

MODES_DIFFER = "its forward differs between training and evaluation"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a class may define that is lost with the class.
_OVERRIDES = (
    "_call_impl",
    "_apply",
    "train",
    "eval",
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)
_CONSTANTS = (
    str, int, float, complex, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_ANY = object()


@dataclass(eq=False)
class _Call:
    """One run of a module's forward: what was recorded in it, in order, and what it returned."""

    module: nn.Module
    events: list[Any] = field(default_factory=list)  # fx.Node or _Call
    result: Any = None
    modes: tuple[bool, ...] = field(default_factory=autograd_modes)

    def nodes(self) -> Iterator[fx.Node]:
        for event in self.events:
            if isinstance(event, _Call):
                yield from event.nodes()
            else:
                yield event


def hooks_of(module: nn.Module) -> str | None:
    """The kinds of hooks on a module that see its calls, in words."""
    kinds = [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name)]
    return " and ".join(kinds) or None


def is_torchs(module: nn.Module) -> bool:
    """Whether it is a layer or container of torch itself, whose forward is not traced."""
    return fx.Tracer().is_leaf_module(module, "")


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def needs_its_class(module: nn.Module) -> str | None:
    """Why a graph cannot take the place of a module's class; None where it can."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    cls = type(module)
    names = [name for name in _OVERRIDES if getattr(cls, name) is not getattr(nn.Module, name)]
    return f"its class overrides {', '.join(names)}" if names else None


def _optional_arguments(module: nn.Module) -> str | None:
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = [p.name for p in parameters if p.default is not p.empty]
    if not names:
        return None
    return f"its forward takes optional arguments ({', '.join(names)}), which tracing would decide"


def trace(root: nn.Module, kept: dict[int, str]) -> fx.Graph | None:
    """The graph of ``root``, the same in training and in evaluation.

    ``kept`` maps the id of each module that stays a single call to the reason; modules found unfit
    are added. None, where that is ``root`` itself. Modules that have hooks, or a class that must
    not be lost, are single calls too. Nothing of ``root`` is changed, no random number drawn.
    """
    reason = needs_its_class(root) or _optional_arguments(root)
    if reason is not None:
        kept[id(root)] = reason
    while id(root) not in kept:
        unfit: dict[nn.Module, str] = {}
        try:
            _, in_training = _record(root, True, kept)
            graph, in_evaluation = _record(root, False, kept)
        except Unfit as error:
            unfit[error.module or root] = str(error)
        else:
            _compare(in_training, in_evaluation, {}, unfit)
            if not unfit:
                return graph
        for module, reason in unfit.items():
            # Found unfit again although it was not entered: the fault is not where it shows.
            kept[id(root if id(module) in kept else module)] = reason
    return None


def _record(root: nn.Module, training: bool, kept: dict[int, str]) -> tuple[fx.Graph, _Call]:
    tracer = _Tracer(kept)
    with unchanged(root, training), contexts_refused():
        try:
            graph = tracer.trace(root)
        except Exception as error:
            text = str(error) or type(error).__name__
            raise Unfit(" ".join(text.split()), tracer.culprit or root) from error
    graph._tracer_cls = InPlaceTracer
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation under PEP 563, which cannot be pickled
            node.type = None
    return graph, tracer.running[0]


class _InPlace(fx.Proxy):
    """What torch's proxies lack: their ``x += y`` is recorded as ``x = x + y``, and what is
    assigned to an attribute is lost."""

    def __getattr__(self, k: str) -> _Attribute:
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise Unfit(f"its forward assigns to the attribute {name} of a tensor")
        super().__setattr__(name, value)


class _Attribute(_InPlace, fx.proxy.Attribute):
    """An attribute of a traced tensor."""


def _define(name: str, function: Callable[..., Any]) -> None:
    def in_place(self: fx.Proxy, *others: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, *others), {})

    setattr(_InPlace, f"__{name}__", in_place)


for _name in fx.graph.inplace_methods:
    _define(_name, getattr(operator, _name))


class InPlaceTracer(fx.Tracer):
    """A tracer that records in-place operators as such; also for loading pickled graphs."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlace(node, self)


class _Tracer(InPlaceTracer):
    # A buffer that is changed in place, or computed with, is to be that of the day.
    proxy_buffer_attributes = True

    def __init__(self, kept: dict[int, str]) -> None:
        super().__init__()
        self.kept = kept
        self.culprit: nn.Module | None = None  # the innermost module whose forward raised
        self.running: list[_Call] = []
        self.randomness = random_states()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.running = [_Call(root)]
        graph = super().trace(root, concrete_args)
        self._check()
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            id(m) in self.kept
            or super().is_leaf_module(m, module_qualified_name)
            or (isinstance(m, _OneCallForward) and type(m).__module__.startswith(_PACKAGE))
            or hooks_of(m) is not None
            or needs_its_class(m) is not None
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._check()
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        call = _Call(m)
        self.running[-1].events.append(call)
        self.running.append(call)
        try:
            call.result = super().call_module(m, forward, args, kwargs)
            self._check()
        except Exception:
            self.culprit = self.culprit or m
            raise
        finally:
            self.running.pop()
        return call.result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._check()
        node = super().create_node(*args, **kwargs)
        self.running[-1].events.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if (
            isinstance(a, Tensor)
            and not isinstance(a, nn.Parameter)
            and a not in self.tensor_attrs
            and all(a is not buffer for buffer in self.root.buffers())
        ):
            raise Unfit("its forward makes a tensor that tracing would freeze")
        return super().create_arg(a)

    def _check(self) -> None:
        """Raises where the forward that is running did what is not in the graph."""
        if autograd_modes() != self.running[-1].modes:
            raise Unfit("its forward switches gradients on or off")
        for (now, _), (then, _) in zip(random_states(), self.randomness, strict=False):
            if not (torch.equal(now, then) if isinstance(now, Tensor) else now == then):
                self.randomness = random_states()
                raise Unfit("its forward draws random numbers that tracing would freeze")


def _compare(a: _Call, b: _Call, pairs: dict[fx.Node, Any], unfit: dict[nn.Module, str]) -> None:
    """Adds to ``unfit`` the innermost modules whose forward did different things in the two runs.

    ``pairs`` maps the nodes of one run to those of the other.
    """
    for x, y in zip_longest(a.events, b.events):
        if isinstance(x, _Call) and isinstance(y, _Call) and x.module is y.module:
            _compare(x, y, pairs, unfit)
        elif isinstance(x, fx.Node) and isinstance(y, fx.Node) and _same(x, y, pairs):
            pairs[x] = y
        else:
            break
    else:
        if _equal(a.result, b.result, pairs):
            return
    unfit[a.module] = MODES_DIFFER
    # What comes out of it says nothing about the modules that use it.
    pairs.update(dict.fromkeys(a.nodes(), _ANY))


def _same(x: fx.Node, y: fx.Node, pairs: dict[fx.Node, Any]) -> bool:
    return (x.op, x.target) == (y.op, y.target) and _equal(
        [x.args, x.kwargs], [y.args, y.kwargs], pairs
    )


def _equal(a: Any, b: Any, pairs: dict[fx.Node, Any]) -> bool:
    a, b = (v.node if isinstance(v, fx.Proxy) else v for v in (a, b))
    if isinstance(a, fx.Node):
        return pairs.get(a) is _ANY or (isinstance(b, fx.Node) and pairs.get(a) is b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key], pairs) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_equal(*both, pairs) for both in zip(a, b, strict=True))
    if isinstance(a, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), pairs)
    return a is b or (isinstance(a, _CONSTANTS) and (a == b or (a != a and b != b)))
