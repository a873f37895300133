"""Comparing two recorded runs of a forward, one in training and one in evaluation."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from .tracer import Call

MODES_DIFFER = "its forward differs between training and evaluation"

_CONSTANTS = (
    str, int, float, complex, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_ANY: Any = object()  # in ``pairs``: a node that counts as equal to every other


def compare(a: Call, b: Call, pairs: dict[fx.Node, Any], unfit: dict[nn.Module, str]) -> None:
    """Adds to ``unfit`` the innermost modules whose forward did different things in the two runs.

    Args:
        a, b: two runs of the forward of one module.
        pairs: nodes of the first run -> nodes of the second; filled here.
        unfit: modules -> the reason; filled here.
    """
    for x, y in zip_longest(a.events, b.events):
        if isinstance(x, Call) and isinstance(y, Call) and x.module is y.module:
            compare(x, y, pairs, unfit)
        elif isinstance(x, fx.Node) and isinstance(y, fx.Node) and _same(x, y, pairs):
            pairs[x] = y
        else:
            break
    else:
        if _equal(a.result, b.result, pairs):
            return
    unfit[a.module] = MODES_DIFFER
    # Its outputs differ, which is no fault of the modules that use them.
    pairs.update(dict.fromkeys(a.nodes(), _ANY))


def _same(x: fx.Node, y: fx.Node, pairs: dict[fx.Node, Any]) -> bool:
    return (x.op, x.target) == (y.op, y.target) and _equal(
        [x.args, x.kwargs], [y.args, y.kwargs], pairs
    )


def _equal(a: Any, b: Any, pairs: dict[fx.Node, Any]) -> bool:
    a, b = (v.node if isinstance(v, fx.Proxy) else v for v in (a, b))
    if isinstance(a, fx.Node):
        return pairs.get(a) is _ANY or (isinstance(b, fx.Node) and pairs.get(a) is b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key], pairs) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_equal(*both, pairs) for both in zip(a, b, strict=True))
    if dataclasses.is_dataclass(type(a)):
        names = [field.name for field in dataclasses.fields(a)]
        return all(_equal(getattr(a, name), getattr(b, name), pairs) for name in names)
    if isinstance(a, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), pairs)
    return a is b or (isinstance(a, _CONSTANTS) and (a == b or (a != a and b != b)))
