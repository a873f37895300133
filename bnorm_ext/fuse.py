"""Fusing batch norms with the additions and activations after them, by ``torch.fx``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import convert
from ._fuse_chains import Fused, Refused, Unit, Usage, fuse_unit
from ._fuse_module import run_graph
from ._fuse_trace import has_forward, is_torchs, trace

__all__ = ["FusionReport", "fuse_batchnorm_act"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse_batchnorm_act` did."""

    #: Name of the batch norm, name of the activation (``"identity"``: none), whether an addition
    #: was fused.
    fused: list[tuple[str, str, bool]] = field(default_factory=list)
    #: Name of the batch norm and why it, or the activation after its addition, was not fused.
    refused: list[tuple[str, str]] = field(default_factory=list)
    #: Name of the module that keeps its own forward, and why it was not traced.
    not_traced: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} batch norms fused"]
        for name, act, residual in self.fused:
            parts = (["addition"] if residual else []) + ([act] if act != "identity" else [])
            lines.append(f"  {name}: with {' and '.join(parts)}")
        for title, entries in (("refused", self.refused), ("not traced", self.not_traced)):
            if entries:
                lines.append(f"{len(entries)} {title}")
                lines += [f"  {name}: {reason}" for name, reason in entries]
        return "\n".join(lines)


def fuse_batchnorm_act(
    model: nn.Module, example_inputs: Tensor | Sequence[Any] | None = None
) -> tuple[nn.Module, FusionReport]:
    """A copy of ``model`` in which batch norm, addition and activation are one call, and a report.

    Fused are ``act(bn(x))``, ``act(bn(x) + residual)`` and ``bn(x) + residual``: the batch norm
    becomes a :class:`bnorm_ext.BatchNormAct1d`, ``2d`` or ``3d``. Known activations are ReLU,
    ReLU6, LeakyReLU, SiLU and Hardswish, as modules, functions or methods, in place or not. All
    other batch norms of the copy are converted as by :func:`bnorm_ext.convert_batchnorm`.

    The copy has the very same parameters and buffers, under the same names and in the same order:
    an optimizer that was built before goes on, checkpoints load both ways with ``strict=True``,
    training one trains the other. Only the modules are copied; ``model`` is not changed.
    ``copy.deepcopy(fused)`` separates them (do so before changing dtype or device of one).

    Each module that is traced becomes a ``torch.fx.GraphModule`` with its hooks, attributes and
    train/eval mode; its other methods are lost, and so are the forwards of the modules inside it,
    which are no longer called. What ``forward`` reads from attributes is fixed when it is traced,
    and ``isinstance(x, Tensor)`` is false then. These keep class and forward, and are fused inside
    their traceable children:

    - modules that cannot be traced, or whose forward differs between training and evaluation,
      draws random numbers, changes attributes of the module, switches gradients, enters autocast,
      checkpoints, uses autograd functions or takes optional arguments;
    - modules with hooks, which are then traced by themselves.

    A module that keeps its forward may call its traced children, but must not index or iterate
    them, nor call the batch norms inside them: these add and activate now.

    A chain is refused, and named in the report, if an intermediate value has several users; a hook
    sees the batch norm or the activation; the addition broadcasts, promotes or writes into a
    tensor that may be seen elsewhere; the batch norm is called more than once; or its input is
    changed in place before the addition. Where shapes and dtypes are not known beforehand, the
    call compares them when it runs and computes what the separate operations compute.

    Shapes and dtypes are those of :class:`bnorm_ext.BatchNormAct1d`, ``2d`` and ``3d``; the method
    is that of Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        model: any module.
        example_inputs: what ``model`` is called with, a tensor or a sequence of positional
            arguments. Only shapes, dtypes and devices are used, nothing is computed. Without it
            they are guessed from the first layer where there is one input.

    Returns:
        The copy, and a :class:`FusionReport`; ``print(report)`` shows it.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Example::

        >>> model, report = bnorm_ext.fuse_batchnorm_act(torchvision.models.resnet50())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_batchnorm_act expects a torch.nn.Module, got {type(model).__name__}")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    copied = _copy_modules(model)
    left = convert.change_classes(copied, to_ours=True)
    units = _Units()
    units.visit(copied, "", None if example_inputs is None else tuple(example_inputs))
    usage = Usage(
        Counter(id(module) for unit in units.found for _, module in unit.norms()),
        _names(copied),
        units.kept,
    )
    fused: list[Fused] = []
    refused: list[Refused] = []
    for unit in units.found:
        fuse_unit(unit, usage)
        if unit.fused:
            run_graph(unit.root, unit.graph)
        fused += unit.fused
        refused += unit.refused
    named = {name for name, _ in refused}
    for cls, names in left.items():
        reason = f"{cls} may do more than batch normalisation"
        refused += [(name, reason) for name in names if name not in named]
    return copied, FusionReport(fused, refused, units.not_traced)


def _copy_modules(model: ModuleT) -> ModuleT:
    """A copy with modules of its own and the very same tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            memo.update({id(v): v for v in held.values() if isinstance(v, Tensor)})
    return copy.deepcopy(model, memo)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """The names that each module is registered under; those in a shared container count once."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            names.setdefault(id(child), []).append(f"{path}.{name}".strip("."))
    names.setdefault(id(model), []).append("(root)")
    return names


class _Units:
    """The modules of a model that are traced: it as a whole where possible, then the modules that
    stay single calls in its graph, and what is in them."""

    def __init__(self) -> None:
        self.found: list[Unit] = []
        self.kept: dict[int, str] = {}
        self.not_traced: list[tuple[str, str]] = []
        self._seen: set[int] = set()

    def visit(
        self, module: nn.Module, path: str, example_inputs: tuple[Any, ...] | None = None
    ) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            self.not_traced.append((path or "(root)", "it is compiled by TorchScript"))
            return
        graph = None
        if any(module.children()) and has_forward(module) and not is_torchs(module):
            graph = trace(module, self.kept)
        if id(module) in self.kept:
            self.not_traced.append((path or "(root)", self.kept[id(module)]))
        if graph is None:
            inside = list(module.named_children())
        else:
            self.found.append(Unit(path, module, graph, example_inputs))
            targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            inside = [(target, module.get_submodule(target)) for target in targets]
        for name, child in inside:
            self.visit(child, f"{path}.{name}".strip("."))
