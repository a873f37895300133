"""Copies of models that hold the very same tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._compat.modules import OF_ALL

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_with_same_tensors(
    root: ModuleT, shared: Mapping[int, Any] = MappingProxyType({})
) -> tuple[ModuleT, dict[nn.Module, nn.Module]]:
    """A copy with modules and attributes of its own and the very same parameters and buffers.

    Args:
        root: what is copied.
        shared: objects that the copy has too, by id.

    Returns:
        The copy, and a dictionary from its modules to those of ``root``.
    """
    memo: dict[int, Any] = dict(shared)
    for module in root.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = tensor
        # deepcopy refuses tensors that are results of autograd.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value
    own = [module for module in root.modules() if _copies_itself(module)]
    for module in own:
        memo[id(module)] = type(module).__new__(type(module))
    for module in own:
        reduced: Any = module.__reduce_ex__(4)
        memo[id(module)].__setstate__(copy.deepcopy(reduced[2], memo))
    copied = copy.deepcopy(root, memo)
    _share_tensors_of_scripts(root, copied)
    return copied, {memo[id(module)]: module for module in root.modules() if id(module) in memo}


def copy_sharing_the_rest(
    root: ModuleT,
) -> tuple[ModuleT, dict[nn.Module, nn.Module], dict[int, Any]]:
    """``copy_with_same_tensors``, whose copy also shares attributes that cannot be copied, such as
    a lock. These come third, by id."""
    try:
        return (*copy_with_same_tensors(root), {})
    except Exception:
        shared = _uncopyable(root)
        return (*copy_with_same_tensors(root, shared), shared)


def _copies_itself(module: nn.Module) -> bool:
    """Whether its class says how it is copied, which may be with tensors of its own. The classes of
    torch and those that are made of them keep to the memo."""
    own = getattr(type(module), "__deepcopy__", None)
    return own is not None and not str(getattr(own, "__module__", "")).startswith("torch.")


def _uncopyable(root: nn.Module) -> dict[int, Any]:
    """Attributes of modules that deepcopy refuses, by id."""
    # Modules stand for their copies: each is looked at by itself.
    kept: dict[int, Any] = {id(module): module for module in root.modules()}
    kept |= {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())}
    found: dict[int, Any] = {}
    tried: set[int] = set()
    for module in root.modules():
        for name, value in vars(module).items():
            known = name in OF_ALL or (isinstance(value, Tensor) and not value.is_leaf)
            if known or id(value) in tried:
                continue
            tried.add(id(value))
            try:
                copy.deepcopy(value, dict(kept))
            except Exception:
                found[id(value)] = value
    return found


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
