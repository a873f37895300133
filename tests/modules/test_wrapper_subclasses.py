"""Subclasses of tensors that handle operators themselves, as libraries of quantised or distributed
tensors have them: they know torch's operators, not this package's."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import bnorm_ext


class Wrapped(torch.Tensor):
    """Holds a tensor, and runs torch's operators on that."""

    __torch_function__ = nn.Parameter.__torch_function__  # the one that is switched off
    seen: ClassVar[set[str]] = set()

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, strides=held.stride()
        )

    def __init__(self, held) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            return NotImplemented
        cls.seen.add(function.overloadpacket.__name__)
        plain = [a.held if isinstance(a, cls) else a for a in args]
        found = function(*plain, **(kwargs or {}))
        if isinstance(found, tuple):
            return tuple(cls(t) if isinstance(t, torch.Tensor) else t for t in found)
        return cls(found) if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnorm_ext.BatchNorm2d])
def test_operators_of_its_own(kind, where, training):
    x = torch.randn(4, 3, 5, 6)
    module, plain = kind(3).train(training), nn.BatchNorm2d(3).train(training)
    Wrapped.seen.clear()
    if where == "weight":
        module.weight = nn.Parameter(Wrapped(module.weight.detach()), requires_grad=False)
    y = module(Wrapped(x) if where == "input" else x)
    assert isinstance(y, Wrapped)
    assert any("batch_norm" in name for name in Wrapped.seen)
    torch.testing.assert_close(y.held, plain(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnorm_ext.BatchNorm2d])
def test_a_call_on_two_tensors_counts_once(kind):
    module = kind(3)
    x = torch.randn(4, 3, 5, 6)
    y = module(TwoTensor(x, x + 1))
    assert module.num_batches_tracked.item() == 1
    torch.testing.assert_close(y.a, y.b, rtol=1e-4, atol=1e-5)
