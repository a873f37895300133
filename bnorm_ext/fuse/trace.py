"""Tracing a module by ``torch.fx`` such that its graph does what the module does, in both modes.

Tracing runs ``forward`` once and keeps what it did to the input; what Python decided meanwhile is
frozen. Modules for which that is wrong are found here and kept as single calls in the graph, with
their own forward. The forwards run on a copy of the module, in a thread of their own, and nothing
of torch is replaced meanwhile: neither the module nor another thread sees any of it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from .._compat.modules import INTERNALS, catch_calls, children_of, release_calls, why_uncaught
from .compare import compare
from .modules import is_leaf
from .proxy import Unfit, Value
from .state import Outside, same
from .watch import RANDOM_FUNCTIONS, NumpyRandom, watching

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Of a tensor's attributes and methods, those that say what it is, not what is in it.
_DESCRIBING = frozenset(
    {
        "shape", "dtype", "device", "layout", "ndim", "names", "requires_grad", "is_leaf",
        "grad_fn",
        "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn", "is_mps",
        "itemsize", "nbytes", "output_nr", "_version", "size", "dim", "ndimension", "numel",
        "nelement", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "is_signed", "get_device", "type", "data_ptr", "storage_offset", "__len__", "__hash__",
        "__repr__", "__format__",
    }
)  # fmt: skip


@dataclass(eq=False)
class Call:
    """One run of a module's forward: what was recorded in it, in order, and what it returned."""

    module: nn.Module
    events: list[Any] = field(default_factory=list)  # fx.Node or Call
    result: Any = None

    def nodes(self) -> Iterator[fx.Node]:
        for event in self.events:
            if isinstance(event, Call):
                yield from event.nodes()
            else:
                yield event

    def modules(self) -> Iterator[nn.Module]:
        """The modules whose forward became part of the graph."""
        yield self.module
        for event in self.events:
            if isinstance(event, Call):
                yield from event.modules()


def _unfit_signature(module: nn.Module) -> str | None:
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return "its forward takes any number of arguments"
    names = [p.name for p in parameters if p.default is not p.empty]
    if not names:
        return None
    return f"its forward takes optional arguments ({', '.join(names)}), which tracing would decide"


@dataclass(frozen=True)
class Traced:
    graph: fx.Graph
    names: frozenset[str]  #: all names in the code that ran, those of attributes among them
    inlined: frozenset[str]  #: paths of the modules whose forward has gone into the graph


def trace(root: nn.Module, kept: dict[int, str]) -> Traced | None:
    """The graph of ``root``, the same in training and in evaluation.

    ``kept`` maps the id of each module that stays a single call to the reason; modules found unfit
    are added. None, where that is ``root`` itself.
    """
    reason = why_uncaught() or _unfit_signature(root)
    if "forward" in vars(root):
        reason = "its forward was replaced on the instance"
    if reason is not None:
        kept[id(root)] = reason
    while id(root) not in kept:
        traced, unfit = _in_a_thread(lambda: _attempt(root, kept))
        if not unfit:
            return traced
        for module, reason in unfit.items():
            # Found unfit again although it was not entered: the fault is not where it shows.
            kept[id(root if id(module) in kept else module)] = reason
    return None


def _in_a_thread(work: Callable[[], Any]) -> Any:
    """The result of ``work``, run where no mode, autocast or profiler of the caller is active."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="fuse_batchnorm_act")
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _attempt(root: nn.Module, kept: dict[int, str]) -> tuple[Traced | None, dict[nn.Module, str]]:
    """A graph, and the modules of ``root`` that are unfit for one, with the reason."""
    try:
        copied, original = copy_of(root)
    except Exception as error:
        return None, {root: f"it cannot be copied: {_one_line(error)}"}
    outside = Outside(root)
    leaves = {c for c, o in original.items() if id(o) in kept or (o is not root and is_leaf(o))}
    unfit: dict[nn.Module, str] = {}
    traced, tracer = [], Tracer(leaves, outside)
    for training in (True, False):
        for module in original:
            module.training = training
        tracer = Tracer(leaves, outside)
        try:
            tracer.trace(copied)
        except Exception as error:
            if not tracer.faults:
                text = f"its forward cannot be traced: {_one_line(error)}"
                unfit[tracer.culprit or copied] = text
        unfit |= tracer.faults
        traced.append(tracer)
        _check_state(tracer, original, unfit)
        if unfit:
            break
    else:
        compare(traced[0].running[0], traced[1].running[0], {}, unfit)
    names = frozenset().union(*(tracer.names for tracer in traced))
    inlined = frozenset(tracer.submodule_paths[m] for m in tracer.running[0].modules())
    reasons = {original[module]: reason for module, reason in unfit.items()}
    return Traced(tracer.graph, names, inlined), reasons


def copy_of(root: ModuleT) -> tuple[ModuleT, dict[nn.Module, nn.Module]]:
    """A copy with modules and attributes of its own and the very same parameters and buffers; the
    modules of the copy -> those of ``root``."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
        # A tensor that was computed with gradients has no copy.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value
    copied = copy.deepcopy(root, memo)
    return copied, {memo[id(module)]: module for module in root.modules()}


def _check_state(
    tracer: Tracer, original: dict[nn.Module, nn.Module], unfit: dict[nn.Module, str]
) -> None:
    """Finds the modules whose attributes, at any depth, a forward has changed."""
    ran = {tracer.submodule_paths[module]: module for module in tracer.running[0].modules()}

    def skip(module: nn.Module, name: str) -> bool:
        return name in INTERNALS

    for module, before in original.items():
        children, children_before = children_of(module), children_of(before)
        same_children = list(children) == list(children_before) and all(
            child is None or original.get(child) is children_before[name]
            for name, child in children.items()
        )
        if not same_children or not same(module, before, skip):
            # The forward that did it is that of the module or of one around it.
            path = tracer.submodule_paths[module]
            while path not in ran:
                path = path.rpartition(".")[0]
            unfit.setdefault(ran[path], "its forward changes attributes of the module")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


class Tracer(fx.Tracer):
    """Records one run of a forward. The modules of the root are reached by an attribute of each
    instance, so the root must be a copy that nobody else uses."""

    def __init__(self, leaves: set[nn.Module], outside: Outside) -> None:
        super().__init__()
        self.outside = outside
        self.numpy_random = NumpyRandom()
        self.leaves = leaves  # called by the graph
        self.names: set[str] = set()  # in the code that ran
        self.faults: dict[nn.Module, str] = {}  # what forwards did that a graph cannot do
        self.culprit: nn.Module | None = None  # the innermost module whose forward raised
        self.running: list[Call] = []

    def fault(self, what: str) -> Unfit:
        """Notes a fault of the forward that is running. To be raised, though that may be caught."""
        self.faults.setdefault(self.running[-1].module, f"its forward {what}")
        return Unfit(self.faults[self.running[-1].module])

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {module: path for path, module in root.named_modules()}
        self.tensor_attrs = {}
        self.running = [Call(root)]
        forward, args = self.create_args_for_root(type(root).forward, True)
        with self._calls_caught(root), _Tensors(self), watching(self.fault, self.names):
            self.running[0].result = forward(*args)
            self._check_outside()
        self.create_node("output", "output", (self.create_arg(self.running[0].result),), {})
        for node in self.graph.nodes:
            node.type = None  # an annotation, which may not be picklable
        return self.graph

    def _check_outside(self) -> None:
        drawn = self.numpy_random.was_used(self.names)
        if drawn is not None:
            raise self.fault(drawn)
        changed = self.outside.restore()
        if changed:
            raise self.fault(f"changes {changed[0]}, outside of the module")

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
                return self.create_proxy("call_module", path, args, kwargs)
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
        kinds = (dict, list, tuple, set)
        if isinstance(a, kinds) and not (type(a) in (*kinds, torch.Size) or hasattr(a, "_fields")):
            raise self.fault(f"makes a {type(a).__name__}, which a graph would not keep")
        if isinstance(a, set):
            raise self.fault("makes a set, which a graph would not keep")
        return super().create_arg(tuple(a) if type(a) is torch.Size else a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.fault("decides by the values of a tensor (control flow)")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.fault("iterates over a tensor, whose length tracing would freeze")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.fault("unpacks a mapping, whose keys tracing would freeze")


class _Tensors(TorchFunctionMode):
    """Sees torch's functions called with real tensors: a parameter or buffer of the root is taken
    for a value of the graph, so that what is computed with it is not frozen."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        root = tracer.root
        self.own = {id(t) for t in (*root.parameters(), *root.buffers())}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(cls, fx.Proxy) for cls in types):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute in _DESCRIBING or id(args[0]) not in self.own:
                return func(*args, **kwargs)
            if name == "__set__":
                raise self.tracer.fault(f"assigns to the attribute {attribute} of a tensor")
            return getattr(self._value(args[0]), attribute)
        if name in RANDOM_FUNCTIONS:
            raise self.tracer.fault("draws random numbers that tracing would freeze")
        if name in _DESCRIBING:
            return func(*args, **kwargs)
        if any(id(tensor) in self.own for tensor in _tensors([args, kwargs])):
            if is_tensor_method_or_property(func):
                return self.tracer.create_proxy("call_method", name, args, kwargs)
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> fx.Proxy:
        return self.tracer.proxy(self.tracer.create_arg(tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
