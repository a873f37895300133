"""Recording one run of a forward as a graph.

The forward runs with proxies in place of its inputs. If it does something that depends on the
values of tensors, or that a graph would not repeat, that is a fault of the module whose forward is
running. A fault is noted before it is raised, because the forward may catch the exception.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._compat.modules import INTERNALS, OF_ALL, catch_calls, release_calls, tensors_of
from .bytecode import Questions
from .constants import is_kept, plain
from .guards import Trait
from .leaves import is_layer, may_be_none
from .outside import Outside
from .process_state import ProcessState
from .proxy import Unfit, Value
from .state import same
from .tensor_calls import TensorCalls
from .watch import Seen, is_watched, unwatched, watching


@dataclass(eq=False)
class Call:
    """One run of a module's forward: the operations and calls in it, in order, and its result."""

    module: nn.Module
    events: list[fx.Node | Call] = field(default_factory=list)
    result: Any = None

    def nodes(self) -> Iterator[fx.Node]:
        for event in self.events:
            if isinstance(event, Call):
                yield from event.nodes()
            else:
                yield event

    def modules(self) -> Iterator[nn.Module]:
        """The modules whose forward is part of the graph."""
        yield self.module
        for event in self.events:
            if isinstance(event, Call):
                yield from event.modules()


class Tracer(fx.Tracer):
    """Records one run of the forward of a root module.

    Calls of the modules in it are intercepted by an attribute of each instance, so the root must be
    a copy that nothing else uses.
    """

    submodule_paths: dict[nn.Module, str]

    def __init__(
        self, leaves: set[nn.Module], outside: Outside, original: dict[nn.Module, nn.Module]
    ) -> None:
        super().__init__()
        self.outside = outside
        self.original = original  # of each module in the copy that is traced
        self.read: set[str] = set()  # paths of the children, parameters and buffers that were read
        self.traits: list[Trait] = []
        self.asks_kinds = False  # whether code may have asked a module by isinstance or hasattr
        self.process = ProcessState()
        self.leaves = leaves  # the modules that the graph calls
        self.seen = Seen()
        self.faults: dict[nn.Module, str] = {}  # the first fault of each module, as text
        self.culprit: nn.Module | None = None  # the innermost module whose forward raised
        self.running: list[Call] = []  # the stack of forwards, outermost first
        self.made: list[nn.Module] = []  # by the forward
        self.exact = False  # whether the type of a number that the graph is given matters

    def fault(self, what: str) -> Unfit:
        """Notes a fault of the forward that is running; the caller raises the result."""
        self.faults.setdefault(self.running[-1].module, f"its forward {what}")
        return Unfit(self.faults[self.running[-1].module])

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.root = root
        self.training = root.training
        self.graph = fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {module: path for path, module in root.named_modules()}
        self.tensor_attrs = {}
        self.running = [Call(root)]
        self.calls = TensorCalls(self)
        forward, args = self.create_args_for_root(type(root).forward, True)
        try:
            with self._calls_caught(root), self.calls, watching(self):
                self.running[0].result = forward(*args)
                self._check_outside()
        finally:
            # Where the forward raised, or ignored a fault.
            left = self._restore(watched=not self.faults)
            if left is not None and not self.faults:
                self.faults[self.culprit or root] = f"its forward {left}"
        for fault in self.faults.values():
            raise Unfit(fault)
        self.exact = True
        self.create_node("output", "output", (self.create_arg(self.running[0].result),), {})
        for node in self.graph.nodes:
            node.type = None  # an annotation of the forward, which may not be picklable
        return self.graph

    def _check_outside(self) -> None:
        watched = is_watched()
        with unwatched():
            did = self._restore(watched)
        if did is not None:
            raise self.fault(did)

    def _restore(self, watched: bool) -> str | None:
        """Restores what the forward has changed besides the module; returns what it did, as text.

        ``watched``: whether the profiler hook was there all the time.
        """
        did = self.process.restore(self.seen.names, watched)
        changed = self.outside.restore()
        if changed:
            did = did or f"changes {changed[0]}, outside of the module"
        return did

    def answers(self, asked: Questions, variables: dict[str, Any]) -> None:
        """Refuses to decide of what class a value is, and whether the result of a module that the
        graph calls is None."""
        for name in asked.types:
            if isinstance(variables.get(name), fx.Proxy):
                raise self.fault("asks for the exact type of a value, which tracing would decide")
        asked_of = map(variables.get, asked.kinds)
        if asked.kinds_of_others or any(isinstance(value, nn.Module) for value in asked_of):
            self.asks_kinds = True
        for name in asked.same:
            if isinstance(variables.get(name), fx.Proxy):
                raise self.fault(f"asks whether {name} is some object, which tracing would decide")
        for name in asked.none:
            value = variables.get(name)
            if isinstance(value, fx.Proxy) and may_be_none(value.node, self.root):
                raise self.fault(f"asks whether {name} is None, which tracing would decide")
        events = self.running[-1].events
        if asked.none_of_results and any(
            isinstance(event, fx.Node) and may_be_none(event, self.root) for event in events
        ):
            raise self.fault("asks whether a result is None, which tracing would decide")

    @contextlib.contextmanager
    def _calls_caught(self, root: nn.Module) -> Iterator[None]:
        modules = [module for module in root.modules() if module is not root]
        classes = {}
        for module in modules:
            if type(module).__call__ is not nn.Module.__call__:
                classes[module] = cls = type(module)
                module.__class__ = type(cls.__name__, (cls,), {"__call__": nn.Module.__call__})
            catch_calls(module, self._catch(module))
        try:
            yield
        finally:
            for module in modules:
                release_calls(module)
            for module, cls in classes.items():
                module.__class__ = cls

    def _catch(self, module: nn.Module) -> Callable[..., Any]:
        leaf = module in self.leaves

        def call(*args: Any, **kwargs: Any) -> Any:
            if leaf:
                path = self.path_of_module(module)
                self._check_leaf(module)
                self.exact = not is_layer(module)
                proxy = self.create_proxy("call_module", path, args, kwargs)
                self.exact = False
                return proxy
            recorded = Call(module)
            self.running[-1].events.append(recorded)
            self.running.append(recorded)
            try:
                recorded.result = module.forward(*args, **kwargs)
                self._check_outside()
            except Exception:
                self.culprit = self.culprit or module
                raise
            finally:
                self.running.pop()
            return recorded.result

        return call

    def _check_leaf(self, leaf: nn.Module) -> None:
        """The graph calls the module as it is outside of this forward, which may have changed it,
        or what it reads, for the time of this call."""
        self.calls.paused = True
        with unwatched():
            for module in leaf.modules():
                before = self.original.get(module)
                if before is None or isinstance(module, torch.jit.ScriptModule):
                    continue  # the state of a scripted module is in C++
                if module.training is not self.training:
                    raise self.fault("switches modules between training and evaluation")
                if not _is_as_before(module, before):
                    raise self.fault("changes attributes of a module before it calls it")
        self.calls.paused = False
        if not is_layer(leaf):
            self._check_outside()

    def reads(self, module: nn.Module, name: str) -> None:
        """The code has read a child, a parameter or a buffer."""
        path = self.submodule_paths.get(module)
        if path is not None:
            self.read.add(f"{path}.{name}".strip("."))

    def attributes(self, names: Iterable[str]) -> Iterator[Any]:
        """The attributes of these names that the running module or its class has in Python."""
        module = self.running[-1].module
        held = vars(module)
        for name in names:
            yield held[name] if name in held else inspect.getattr_static(type(module), name, None)

    def is_unseen(self, value: Any) -> bool:
        """Whether what changes in the object would not be seen."""
        return self.outside.is_unseen(value)

    def makes(self, module: nn.Module) -> None:
        """The code makes a module. Its settings are then the code's own."""
        self.made.append(module)

    def runs(self, module: nn.Module, forward: bool) -> None:
        """The code calls a module, or runs its forward. Of a module from elsewhere the graph would
        have the settings of now; those of a layer are guarded."""
        if module in self.submodule_paths:
            if forward and module in self.leaves:  # a call is caught
                self.seen.names.update(vars(module).keys() - OF_ALL)
        elif not any(module is made for made in self.made):
            raise self.fault("calls a module that it does not contain")

    def path_of_module(self, mod: nn.Module) -> str:
        if mod not in self.submodule_paths:
            raise self.fault("calls a module that it does not contain")
        return self.submodule_paths[mod]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.running[-1].events.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            held = (*self.root.named_parameters(), *self.root.named_buffers())
            name = next((name for name, tensor in held if tensor is a), None)
            if name is None:
                raise self.fault("makes a tensor that tracing would freeze")
            return self.create_node("get_attr", name, (), {})
        if type(a) is OrderedDict:
            pairs = [(self.create_arg(k), self.create_arg(v)) for k, v in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if not is_kept(a, self.exact):
            raise self.fault(f"makes a {type(a).__name__}, which a graph would not keep")
        return super().create_arg(plain(a))

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.fault("decides by the values or the shape of a tensor (control flow)")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.fault("iterates over a tensor, whose length tracing would freeze")


def _is_as_before(module: nn.Module, before: nn.Module) -> bool:
    now, then = tensors_of(module), tensors_of(before)
    return all(
        set(a) == set(b) and all(a[name] is b[name] for name in a)
        for a, b in zip(now, then, strict=True)
    ) and same(_attributes(module), _attributes(before))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in INTERNALS}
