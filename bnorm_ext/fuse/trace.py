"""Tracing a module into a ``torch.fx`` graph that is right in training and in evaluation.

Tracing runs ``forward`` once and records the operations on its input. Decisions that Python takes
meanwhile are frozen into the graph. Modules for which that would be wrong are found here; the graph
calls such a module, which runs its own forward.

The forwards run on a copy of the module and in a separate thread, and nothing in torch is patched.
So neither the module nor any other thread is affected.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from .._compat.modules import INTERNALS, children_of, why_uncaught
from .compare import compare
from .copying import copy_sharing_the_rest
from .guards import Asked
from .leaves import is_leaf
from .names import Scopes
from .outside import Outside
from .program import CODE_NAMES
from .proxy import Unfit
from .state import same
from .tracer import Tracer

ResultT = TypeVar("ResultT")


def _unfit_signature(module: nn.Module) -> str | None:
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return "its forward takes any number of arguments"
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "its forward has arguments that may be given by position only, or by name only"
    names = [p.name for p in parameters if p.default is not p.empty]
    taken = sorted(parameter.name for parameter in parameters if parameter.name in CODE_NAMES)
    if taken:
        return f"its forward has an argument {taken[0]}, a name that the graph's code uses"
    if not names:
        return None
    return f"its forward takes optional arguments ({', '.join(names)}), which tracing would decide"


@dataclass(frozen=True)
class Traced:
    """The result of tracing one module."""

    graph: fx.Graph
    asked: Asked  #: what the code that ran has asked of the modules
    ran: Scopes  #: the code that ran, with its global variables
    inlined: frozenset[str]  #: paths of the modules whose forward is part of the graph


def trace(root: nn.Module, kept: dict[int, str]) -> Traced | None:
    """The graph of ``root``; None if ``root`` has to keep its own forward.

    Args:
        root: the module.
        kept: id of each module that keeps its own forward -> the reason. Modules that are found
            here are added, ``root`` among them where the result is None.
    """
    reason = why_uncaught() or _unfit_signature(root)
    if parametrize.is_parametrized(root):
        # Removing the parametrisation looks for its class as the module's own.
        reason = "it is parametrised (torch.nn.utils.parametrize), which replaces its class"
    if isinstance(root, fx.GraphModule):
        reason = "it is a graph of torch.fx: fuse the model that it was made from"
    if "forward" in vars(root):
        reason = "its forward was replaced on the instance"
    if reason is not None:
        kept[id(root)] = reason
    while id(root) not in kept:
        traced, unfit = _in_a_thread(lambda: _attempt(root, kept))
        if not unfit:
            return traced
        for module, reason in unfit.items():
            # A module that is only called cannot be at fault itself: then `root` is given up, which
            # also ends the loop.
            kept[id(root if id(module) in kept else module)] = reason
    return None


def _in_a_thread(work: Callable[[], ResultT]) -> ResultT:
    """The result of ``work``, run in a thread in which no mode, autocast or profiler of the caller
    is active."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="fuse_batchnorm_act")
    thread.start()
    thread.join()
    result: ResultT
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _attempt(root: nn.Module, kept: dict[int, str]) -> tuple[Traced | None, dict[nn.Module, str]]:
    """Traces ``root`` in both modes.

    Returns:
        The graph, valid only if no module is unfit; and the unfit modules of ``root``, each with
        the reason.
    """
    try:
        copied, original, shared = copy_sharing_the_rest(root)
    except Exception as error:
        return None, {root: f"it cannot be copied: {_one_line(error)}"}
    outside = Outside(root, shared)
    wanted = [(p, p.requires_grad) for p in root.parameters()]  # the copy has the very same ones
    leaves = {c for c, o in original.items() if id(o) in kept or (o is not root and is_leaf(o))}
    unfit: dict[nn.Module, str] = {}
    traced, tracer = [], Tracer(leaves, outside, original)
    for training in (True, False):
        for module in original:
            module.training = training
        tracer = Tracer(leaves, outside, original)
        try:
            tracer.trace(copied)
        except (Exception, Unfit) as error:
            if not tracer.faults:
                text = f"its forward cannot be traced: {_one_line(error)}"
                unfit[tracer.culprit or copied] = text
        unfit |= tracer.faults
        for parameter, wants in wanted:
            if parameter.requires_grad is not wants:
                parameter.requires_grad_(wants)
                unfit.setdefault(copied, "its forward switches requires_grad of a parameter")
        if any(module.training is not training for module in original):
            unfit.setdefault(copied, "its forward switches modules between training and evaluation")
        traced.append(tracer)
        _check_state(tracer, original, unfit)
        if unfit:
            break
    else:
        compare(traced[0].running[0], traced[1].running[0], {}, unfit)
    asked = Asked(
        frozenset().union(*(tracer.seen.names for tracer in traced)),
        frozenset().union(*(tracer.read for tracer in traced)),
        tuple(dict.fromkeys(trait for tracer in traced for trait in tracer.traits)),
        any(tracer.asks_kinds for tracer in traced),
    )
    ran = {code: scope for tracer in traced for code, scope in tracer.seen.ran.items()}
    inlined = frozenset(tracer.submodule_paths[m] for m in tracer.running[0].modules())
    reasons = {original[module]: reason for module, reason in unfit.items()}
    return Traced(tracer.graph, asked, ran, inlined), reasons


def _check_state(
    tracer: Tracer, original: dict[nn.Module, nn.Module], unfit: dict[nn.Module, str]
) -> None:
    """Adds to ``unfit`` the modules whose forward has changed attributes of a module, or anything
    that such an attribute refers to."""
    ran = {tracer.submodule_paths[module]: module for module in tracer.running[0].modules()}
    for module, before in original.items():
        if isinstance(module, torch.jit.ScriptModule):  # its state is in C++
            continue
        children, children_before = children_of(module), children_of(before)
        same_children = list(children) == list(children_before) and all(
            child is None or original.get(child) is children_before[name]
            for name, child in children.items()
        )
        if not same_children or not same(module, before, INTERNALS):
            # It was changed by its own forward or by that of a module that contains it.
            path = tracer.submodule_paths[module]
            while path not in ran:
                path = path.rpartition(".")[0]
            unfit.setdefault(ran[path], "its forward changes attributes of the module")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())
