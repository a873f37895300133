"""Copies of models that hold the very same tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_with_same_tensors(root: ModuleT) -> tuple[ModuleT, dict[nn.Module, nn.Module]]:
    """A copy with modules and attributes of its own and the very same parameters and buffers.

    Returns:
        The copy, and a dictionary from its modules to those of ``root``.
    """
    memo: dict[int, Any] = {}
    for module in root.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
        # deepcopy refuses tensors that are results of autograd.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value
    copied = copy.deepcopy(root, memo)
    return copied, {memo[id(module)]: module for module in root.modules() if id(module) in memo}
