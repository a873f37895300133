"""Fusing batch norms with the additions and activations that follow them, by ``torch.fx``.

The steps, and where they are: trace the modules (``trace.py``, ``tracer.py``, ``proxy.py``,
``constants.py``), and see what their forwards change or ask for (``watch.py``, ``effects.py``,
``bytecode.py``, ``tensor_calls.py``, ``outside.py``, ``process_state.py``, ``state.py``); find
chains of batch norm, addition and activation in the graphs and replace them (``chains.py``,
``patterns.py``, ``shapes.py``, ``aliasing.py``, ``call.py``); make the modules run the graphs
(``program.py``, ``guards.py``, ``names.py``, ``contents.py``, ``fused_module.py``).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from .. import convert
from .._compat import AnyBatchNorm
from .._compat.modules import children_of, is_compiled
from .call import batch_norm_add_act
from .chains import Fused, Refused, Unit, Usage, fuse_unit, may_do_more
from .copying import copy_sharing_the_rest
from .fused_module import FusedModule, Fusion, be_undoable, run_graph, unfuse
from .guards import make_guard
from .leaves import asks_for_exact_types, has_forward, is_layer
from .names import Names, names_of
from .program import Program
from .trace import Traced, trace

__all__ = ["FusedModule", "FusionReport", "fuse_batchnorm_act"]


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse_batchnorm_act` did."""

    #: Name of the batch norm, name of the activation (``"identity"`` for none), and whether an
    #: addition was fused.
    fused: list[tuple[str, str, bool]] = field(default_factory=list)
    #: Name of the batch norm, and why it, or the activation after its addition, was not fused.
    refused: list[tuple[str, str]] = field(default_factory=list)
    #: Name of a module that keeps its own forward, and why it was not traced.
    not_traced: list[tuple[str, str]] = field(default_factory=list)
    #: Names of the batch norms that no graph calls: either nothing calls them, or a module that
    #: was not traced.
    not_called: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.fused)
        lines = [f"{count} batch norm{'' if count == 1 else 's'} fused"]
        for name, act, residual in self.fused:
            parts = (["addition"] if residual else []) + ([act] if act != "identity" else [])
            lines.append(f"  {name}: with {' and '.join(parts)}")
        for title, entries in (("refused", self.refused), ("not traced", self.not_traced)):
            if entries:
                lines.append(f"{len(entries)} {title}")
                lines += [f"  {name}: {reason}" for name, reason in entries]
        if self.not_called:
            lines.append(f"{len(self.not_called)} not called by a traced forward")
            lines += [f"  {name}" for name in self.not_called]
        return "\n".join(lines)


def fuse_batchnorm_act(
    model: nn.Module, example_inputs: Tensor | Sequence[Any] | None = None
) -> tuple[nn.Module, FusionReport]:
    """Makes a copy of ``model`` that computes batch norm, addition and activation in one call.

    Fused are ``act(bn(x))``, ``act(bn(x) + residual)`` and ``bn(x) + residual``. Known activations
    are ReLU, ReLU6, LeakyReLU, SiLU and Hardswish, as modules, functions or methods, in place or
    not. All batch norms of the copy are converted as by :func:`bnorm_ext.convert_batchnorm`.

    **What changes.** In the copy every module keeps its name, hooks, methods and children; ``bn1``
    is still a batch norm, ``relu`` a ReLU. A module whose forward ``torch.fx`` can trace runs a
    graph instead (its class becomes a subclass of its own class), in which one call stands for
    several. That call does what the separate calls would do if one of the modules was replaced, has
    hooks or another activation, or if shapes or dtypes do not fit. The modules' own forwards run if
    a module whose forward is part of the graph, or that it reads, was changed or has hooks, and
    while a tool traces or exports the model or looks at all calls. ``fused.unfuse()`` or
    :func:`bnorm_ext.revert_batchnorm` undoes fusing.

    **What is shared.** The copy has the very same parameters and buffers, under the same names and
    in the same order. An optimizer that was built before stays valid, checkpoints load both ways
    with ``strict=True``, and training one trains the other. ``copy.deepcopy(fused)`` separates
    them; do that before you change the dtype or device of one. ``model`` itself is not changed.
    Modules that are not children, as in a list, are copied with their tensors; objects that cannot
    be copied, such as a lock, are shared.

    **What is not fused.** A module keeps its own forward, and only its children are fused, if the
    forward cannot be traced, differs between training and evaluation, draws or seeds random
    numbers, changes the module or something outside of it, switches gradients or modes, asks
    whether gradients or autocast are on, enters autocast, checkpoints, handles exceptions, uses
    autograd functions, asks for the type of its input or what object it is (``x.dtype is
    torch.half``), or whether the result of a module is None, changes a module for the time of a
    call, enters a mode, labels regions for profilers, goes through a structure of values
    (``tree_map``), calls a module that is not among its children, asks whether it is being
    compiled, uses locks, queues, files, variables of a thread or objects that cannot be copied,
    reads the clock, environment or context variables, or takes arguments that are optional, or that
    are given by position only or by name only. A module with hooks is traced by itself. A module
    whose forward asks for exact types (``type(child) is Block``), and those in it, keep
    theirs and are not fused; such a model gets no method ``unfuse``. A call with arguments that are
    neither tensors nor lists, tuples or dictionaries of them runs the module's own forward. A chain
    is refused, and named in the report, if an intermediate value has several users; a hook sees the
    batch norm or the activation; the addition broadcasts, promotes, or writes into a tensor that
    may be used elsewhere; or the input of the batch norm is changed in place before the addition.

    **What is not seen.** Functions, classes and constants that a forward reads from Python modules,
    classes or enclosing functions may be replaced after fusing, and modules, settings and shapes of
    parameters that it reads may change: the module's own forwards run then. Some changes a graph
    does not see: of what only torch's own functions use; inside of arrays, of objects without
    ``__dict__``, and of global objects that hold more than 100 values; None as a result of a module
    whose forward has it from another function; messages to a logger that was off while tracing;
    what is more than four levels deep in containers and objects, or two where they hold more than
    1000 values. Call ``unfuse`` and fuse again after such a change. With torch 2.8 and 2.9,
    ``torch.compile`` with ``fullgraph=True`` raises an error if settings that a forward reads hold
    a number of numpy.

    Shapes and dtypes are those of :class:`bnorm_ext.BatchNormAct1d`, ``2d`` and ``3d``; the method
    is that of Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        model: any module.
        example_inputs: what ``model`` is called with: a tensor, or a sequence of positional
            arguments. Only their shapes, dtypes and devices are used; nothing is computed. If None
            and the model takes one input, its shape is guessed from the first layer.

    Returns:
        The copy, and a :class:`FusionReport`; ``print(report)`` shows it.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``; ``example_inputs`` is neither a tensor
            nor a sequence of arguments.
        ValueError: there are more ``example_inputs`` than ``model`` takes, or fewer.

    Example::

        >>> model, report = bnorm_ext.fuse_batchnorm_act(torchvision.models.resnet50())
    """
    convert.check_module(model, "fuse_batchnorm_act")
    inputs = _checked(model, example_inputs)
    copied, *_ = copy_sharing_the_rest(model)
    unfuse(copied)
    left = convert.change_classes(copied, to_ours=True)
    units = _Units()
    units.visit(copied, "", inputs)
    usage = Usage(
        Counter(id(module) for unit in units.found for _, module in unit.norms()),
        _names(copied),
        units.kept,
    )
    fused: list[Fused] = []
    refused: list[Refused] = []
    seen: set[int] = set()
    for unit in units.found:
        seen |= {id(module) for _, module in unit.norms()}
        fuse_unit(unit, usage)
        fused += unit.fused
        refused += unit.refused
    # Innermost first: the modules that a graph calls have their final class when its guard is made.
    for unit in reversed(units.found):
        if unit.fused:
            traced = units.traced[id(unit.root)]
            guarded = traced.inlined | unit.removed | _around(unit)
            program = Program(unit.graph, dict(unit.root.named_modules()))
            called = {path: index for index, path in enumerate(program.modules)}
            guard = make_guard(unit.root, guarded, called, traced.asked)
            guard.outside = _names_outside(unit, traced)
            run_graph(unit.root, Fusion(program, guard))
    if not asks_for_exact_types(copied):
        be_undoable(copied)
    named = {name for name, _ in refused}
    for cls, names in left.items():
        refused += [(name, may_do_more(cls)) for name in names if name not in named]
    named |= {name for names in left.values() for name in names}
    not_called: list[str] = []
    for name, module in copied.named_modules():
        if isinstance(module, AnyBatchNorm) and id(module) not in seen and name not in named:
            not_called.append(name or "(root)")
    return copied, FusionReport(fused, refused, units.not_traced, not_called)


def _checked(model: nn.Module, example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str | bytes):
        raise TypeError(
            "example_inputs must be a tensor or a sequence of positional arguments, got "
            f"{type(example_inputs).__name__}"
        )
    try:
        inspect.signature(type(model).forward).bind(model, *example_inputs)
    except TypeError as error:
        raise ValueError(
            f"example_inputs are not what {type(model).__name__} takes: {error}"
        ) from None
    return tuple(example_inputs)


def _around(unit: Unit) -> set[str]:
    """Paths of the modules that contain what the graph of ``unit`` calls or reads."""
    targets = [
        str(node.target) for node in unit.graph.nodes if node.op in ("call_module", "get_attr")
    ]
    parts = [target.split(".") for target in targets]
    return {".".join(names[:end]) for names in parts for end in range(1, len(names))}


def _names_outside(unit: Unit, traced: Traced) -> Names:
    """What the code that the graph of ``unit`` stands for names outside of the modules."""
    modules = [unit.root.get_submodule(path) for path in sorted(traced.inlined)]
    ran = dict(traced.ran)
    for node in unit.graph.nodes:
        if node.target is batch_norm_add_act and len(node.args) > 4:  # with an activation
            act = node.args[4]
            if isinstance(act, fx.Node):
                module = unit.root.get_submodule(str(act.target))
                modules.append(module)
                forward: Any = type(module).forward
                ran[forward.__code__] = forward.__globals__
    return names_of(ran, modules, traced.asked.names)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each module is registered, by id; those in a shared container count
    once."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, child in children_of(module).items():
            names.setdefault(id(child), []).append(f"{path}.{name}".strip("."))
    names.setdefault(id(model), []).append("(root)")
    return names


class _Units:
    """The modules of a model that are traced: the model as a whole where possible, and then in the
    same manner the modules that its graph calls."""

    def __init__(self) -> None:
        self.found: list[Unit] = []
        self.traced: dict[int, Traced] = {}
        self.kept: dict[int, str] = {}
        self.not_traced: list[tuple[str, str]] = []
        self._seen: set[int] = set()

    def visit(
        self,
        module: nn.Module,
        path: str,
        example_inputs: tuple[Any, ...] | None = None,
        asking: str | None = None,
    ) -> None:
        """``asking``: the path of a module around this one whose forward asks for exact types."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        reason = is_compiled(module)
        if reason is not None:
            self.not_traced.append((path or "(root)", reason))
            return
        traced = None
        if any(module.children()) and has_forward(module) and not is_layer(module):
            if asking is None:
                traced = trace(module, self.kept)
            else:
                self.kept[id(module)] = f"{asking} asks for exact types, which fusing would change"
            if asks_for_exact_types(module):
                asking = asking or path or "(root)"
        if id(module) in self.kept:
            self.not_traced.append((path or "(root)", self.kept[id(module)]))
        if traced is None:
            inside = list(module.named_children())
        else:
            self.found.append(Unit(path, module, traced.graph, example_inputs))
            self.traced[id(module)] = traced
            targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
            inside = [(target, module.get_submodule(target)) for target in targets]
        for name, child in inside:
            self.visit(child, f"{path}.{name}".strip("."), asking=asking)
