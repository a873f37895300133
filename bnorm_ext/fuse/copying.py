"""Copies of models that hold the very same tensors."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
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
    _share_tensors_of_scripts(root, copied)
    return copied, {memo[id(module)]: module for module in root.modules() if id(module) in memo}


def _share_tensors_of_scripts(root: nn.Module, copied: nn.Module) -> None:
    """Gives TorchScript modules in the copy the tensors of the original: they are copied in C++,
    which does not look for the tensors that deepcopy is to keep."""
    originals = dict(root.named_modules())
    for path, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            before = originals[path]
            tensors = (before.named_parameters(recurse=False), before.named_buffers(recurse=False))
            for name, tensor in itertools.chain(*tensors):
                setattr(module, name, tensor)
