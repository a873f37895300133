"""Shapes and dtypes in a graph, as far as fake tensors can tell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .._compat import AnyBatchNorm, fake_tensors
from .._compat.modules import hooks_of
from ..modules import _BatchNormMixin
from .aliasing import is_torchs_function

# Usual sizes by number of spatial dimensions, large enough for every strided layer of a net.
_GUESSED_SIZES = {1: (256,), 2: (224, 224), 3: (32, 112, 112)}
_NORM_DIMS = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


class _Unknown(Exception):
    """The value of a node cannot be determined."""


def propagate(
    graph: fx.Graph, root: nn.Module, example_inputs: tuple[Any, ...] | None
) -> dict[fx.Node, Any]:
    """The value of each node for which it can be determined, with fake tensors for tensors.

    No memory is allocated and no tensor of the model is changed. The results of code outside of
    torch are unknown, and so is everything that depends on them.
    """
    known: dict[fx.Node, Any] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with fake_tensors() as fake, torch.no_grad():
        if fake is None:
            return {}
        if example_inputs is None:
            example_inputs = _guess(placeholders, root)
        for node, value in zip(placeholders, example_inputs, strict=False):
            known[node] = _fake(fake, value)
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                try:
                    known[node] = _run(node, root, fake, known)
                except Exception:  # any failure means that the value stays unknown
                    continue
    return known


def _fake(fake: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return fake(value)
    if isinstance(value, tuple | list):
        return type(value)(_fake(fake, v) for v in value)
    if isinstance(value, dict):
        return {key: _fake(fake, v) for key, v in value.items()}
    return value


def _guess(placeholders: list[fx.Node], root: nn.Module) -> tuple[Any, ...]:
    """Inputs for a graph with one placeholder, if a layer that takes it determines the number of
    channels; else none."""
    if len(placeholders) != 1:
        return ()
    for user in placeholders[0].users:
        if user.op == "call_module":
            layer = root.get_submodule(str(user.target))
            shape: tuple[int, ...] | None = None
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                shape = (2, layer.in_channels, *_GUESSED_SIZES[len(layer.kernel_size)])
            elif isinstance(layer, nn.Linear):
                shape = (2, layer.in_features)
            elif isinstance(layer, AnyBatchNorm):
                dims = next((d for cls, d in _NORM_DIMS.items() if isinstance(layer, cls)), 0)
                shape = (2, layer.num_features, *_GUESSED_SIZES.get(dims, ()))
            if shape is not None:
                weight: Any = layer.weight
                if weight is None:
                    return (torch.empty(shape),)
                return (torch.empty(shape, dtype=weight.dtype, device=weight.device),)
    return ()


def _run(
    node: fx.Node,
    root: nn.Module,
    fake: Callable[[Tensor], Tensor],
    known: dict[fx.Node, Any],
) -> Any:
    def look_up(argument: fx.Node) -> Any:
        if argument not in known:
            raise _Unknown
        return known[argument]

    args: Any = map_arg(node.args, look_up)
    kwargs: Any = map_arg(node.kwargs, look_up)
    target: Any = node.target
    if node.op == "get_attr":
        path, _, name = target.rpartition(".")
        return _fake(fake, getattr(root.get_submodule(path), name))
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_function":
        if not is_torchs_function(target):
            raise _Unknown
        return target(*args, **kwargs)
    module = root.get_submodule(target)
    if hooks_of(module):
        raise _Unknown
    if isinstance(module, _BatchNormMixin):
        return torch.empty_like(args[0] if args else kwargs["input"])
    if not type(module).__module__.startswith("torch.nn") or any(module.children()):
        raise _Unknown
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes = {name: _fake(fake, tensor) for name, tensor in tensors.items()}
    return torch.func.functional_call(module, fakes, args, kwargs)
