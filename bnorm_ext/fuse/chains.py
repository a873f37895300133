"""Finding chains of batch norm, addition and activation in a graph, and replacing them by one call
where that is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from .._compat import AnyBatchNorm, is_lazy
from .._compat.modules import hooks_of
from ..convert import class_name
from ..modules import is_ours
from .aliasing import Aliases, fresh
from .call import CHANGES_RESIDUAL, batch_norm_add_act, own_act
from .patterns import Act, Addition, as_act, as_addition, remove_identities
from .shapes import propagate

_KEEPS_RESIDUAL = ("silu", "hardswish")  # their backward reads the residual

Fused = tuple[str, str, bool]
Refused = tuple[str, str]


class _Refusal(Exception):
    """Why a chain is not fused."""


def may_do_more(cls: type[nn.Module]) -> str:
    """The reason for which a batch norm of another class is not fused."""
    return f"{class_name(cls)} may do more than batch normalisation"


@dataclass
class Unit:
    """A traced module and its graph."""

    path: str
    root: nn.Module
    graph: fx.Graph
    example_inputs: tuple[Any, ...] | None
    removed: set[str] = field(default_factory=set)  #: paths of identities taken out of the graph
    fused: list[Fused] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def norms(self) -> list[tuple[fx.Node, nn.Module]]:
        """The calls of batch norms, and their modules."""
        calls = (node for node in self.graph.nodes if node.op == "call_module")
        pairs = ((node, self.root.get_submodule(str(node.target))) for node in calls)
        return [(node, module) for node, module in pairs if isinstance(module, AnyBatchNorm)]


@dataclass(frozen=True)
class Usage:
    """Who calls and who contains the modules of a model, by their id."""

    calls: Counter[int]  #: number of calls in all graphs
    names: Mapping[int, list[str]]  #: names under which the module is registered
    kept: Mapping[int, str]  #: modules that keep their own forward, and why


def fuse_unit(unit: Unit, usage: Usage) -> None:
    """Rewrites the graph of ``unit``. Its modules are not changed."""
    unit.removed = remove_identities(unit.graph, unit.root)
    known = propagate(unit.graph, unit.root, unit.example_inputs)
    # Last first: where the outputs of two batch norms are added, the later one takes the addition.
    for node, module in reversed(unit.norms()):
        name = f"{unit.path}.{node.target}".strip(".")
        try:
            fused = _fuse_one(unit, usage, known, node, module, name)
        except _Refusal as refusal:
            unit.refused.append((name, str(refusal)))
        else:
            if fused is not None:
                unit.fused.append(fused)
    unit.fused.reverse()
    unit.refused.reverse()
    unit.graph.lint()


def _fuse_one(
    unit: Unit,
    usage: Usage,
    known: Mapping[fx.Node, Any],
    node: fx.Node,
    module: nn.Module,
    name: str,
) -> Fused | None:
    root = unit.root
    users = list(node.users)
    act: Act | None = next((a for user in users if (a := as_act(user, root, node))), None)
    addition: Addition | None = next((s for user in users if (s := as_addition(user, node))), None)
    has_residual = len(node.args) > 1 or "residual" in node.kwargs
    if own_act(module)[0] != "identity" or (has_residual and act is None):
        return None
    if act is None and addition is None:
        return None
    _check_module(module)
    if len(users) > 1:
        raise _Refusal("its output has several users")
    input = node.args[0] if node.args else node.kwargs.get("input")
    residual, kind = None, "none"
    if addition is None:
        assert act is not None
        if act.refusal:
            raise _Refusal(act.refusal)
        if has_residual:
            residual = node.args[1] if len(node.args) > 1 else node.kwargs["residual"]
            kind = "bn(x, r)"
        replaced, place = [node, act.node], node
    else:
        if not isinstance(input, fx.Node):
            raise _Refusal("its input is a constant")
        _check_order(unit, usage, node, module)
        aliases = Aliases(unit.graph, root)
        _check_addition(addition, aliases, known, root, node, input)
        act, left = _act_of_sum(addition, aliases, root)
        if left is not None:
            unit.refused.append((name, left))
        residual, kind = addition.residual, addition.kind
        replaced, place = [node, addition.node], addition.node
        if act is not None:
            replaced.append(act.node)
    with unit.graph.inserting_before(place):
        arguments: list[Any] = [unit.graph.get_attr(str(node.target)), input, residual, kind]
        if act is not None and act.node.op == "call_module":
            arguments.append(unit.graph.get_attr(str(act.node.target)))
        elif act is not None:
            arguments += [act.name, act.negative_slope]
        call = unit.graph.call_function(batch_norm_add_act, tuple(arguments))
    call.meta = dict(replaced[-1].meta)
    replaced[-1].replace_all_uses_with(call)
    for old in reversed(replaced):
        unit.graph.erase_node(old)
    return name, "identity" if act is None else act.name, kind != "none"


def _check_module(module: nn.Module) -> None:
    """Refuses modules whose call is not just a batch norm of this package."""
    if is_lazy(module):
        raise _Refusal("it is not initialised: call the model once before")
    if not is_ours(module):
        raise _Refusal(may_do_more(type(module)))
    if hooks_of(module):
        raise _Refusal(f"it has {hooks_of(module)}")
    if "forward" in vars(module):
        raise _Refusal("its forward was replaced on the instance")


def _check_order(unit: Unit, usage: Usage, node: fx.Node, module: nn.Module) -> None:
    """Fusing moves the batch norm to the place of the addition. Refuses that if anything else may
    read or update its running statistics in between."""
    if usage.calls[id(module)] > 1:
        raise _Refusal("it is called more than once")
    if len(usage.names[id(module)]) > 1:
        raise _Refusal(f"it has several names: {', '.join(usage.names[id(module)])}")
    for _, norm in unit.norms():
        if norm is not module and _shares_statistics(norm, module):
            raise _Refusal("it shares its running statistics with another batch norm")
    for other in unit.graph.nodes:
        if other.op == "get_attr" and str(other.target).startswith(f"{node.target}."):
            raise _Refusal(f"its tensor {other.target} is used elsewhere")
    for container in _containers(str(node.target)):
        if id(unit.root.get_submodule(container)) in usage.kept:
            raise _Refusal(f"{container} runs its own forward, which may call it too")


def _shares_statistics(a: Any, b: Any) -> bool:
    return any(
        getattr(a, name) is not None and getattr(a, name) is getattr(b, name)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )


def _check_addition(
    addition: Addition,
    aliases: Aliases,
    known: Mapping[fx.Node, Any],
    root: nn.Module,
    node: fx.Node,
    input: fx.Node,
) -> None:
    """Refuses additions of tensors that differ in shape, dtype or device, additions that change a
    tensor which is used elsewhere, and inputs that are changed before the addition."""
    if addition.refusal:
        raise _Refusal(addition.refusal)
    residual = addition.residual
    # Where the shape of the sum is unknown, the addition failed on the guessed input: the guess was
    # wrong and says nothing.
    if input in known and residual in known and addition.node in known:
        x, r = known[input], known[residual]
        if not isinstance(r, Tensor):
            raise _Refusal(f"what is added is no tensor but {r!r}")
        if x.shape != r.shape:
            raise _Refusal(f"the addition broadcasts: {list(x.shape)} and {list(r.shape)}")
        if x.dtype != r.dtype or x.device != r.device:
            raise _Refusal(
                f"the addition is of {x.dtype} on {x.device} and {r.dtype} on {r.device}"
            )
    if addition.kind in CHANGES_RESIDUAL:
        if not fresh(residual, root):
            raise _Refusal(
                f"the addition changes {residual.name} in place, which may be an input of the "
                "model or share memory with another tensor"
            )
        if len(residual.users) > 1:
            raise _Refusal(
                f"the addition changes {residual.name} in place, which is used elsewhere"
            )
    culprit = aliases.changed_between(input, node, addition.node)
    if culprit is not None:
        raise _Refusal(f"{culprit.name} may change its input in place before the addition")


def _act_of_sum(
    addition: Addition, aliases: Aliases, root: nn.Module
) -> tuple[Act | None, str | None]:
    """The activation after an addition, if it can be fused too; otherwise why it cannot."""
    users = list(addition.node.users)
    act = next((a for user in users if (a := as_act(user, root, addition.node))), None)
    if act is None:
        return None, None
    what = f"fused with its addition but without {act.name}: "
    if len(users) > 1:
        return None, what + "the sum has several users"
    if act.refusal:
        return None, what + act.refusal
    # A module may be replaced later by an activation that keeps the residual.
    if act.name in _KEEPS_RESIDUAL or act.node.op == "call_module":
        # The activation may work in place on the sum, and after `residual += y` that is the memory
        # of the residual: it is not counted as a change.
        culprit = aliases.changed_between(addition.residual, addition.node, but=act.node)
        if culprit is not None:
            return None, f"{what}{culprit.name} may change the residual in place afterwards"
    return act, None


def _containers(path: str) -> list[str]:
    """Paths of the modules that contain the one at ``path``, innermost first, without the root."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
