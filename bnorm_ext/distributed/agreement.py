"""The check that all ranks run the same layer, at its first call in a process group.

Collectives of different sizes would end in an error of the backend that names no layer, or wait for
the time-out. So the ranks first exchange a message of fixed size that says what they are about to
normalise. Later calls of the layer with as many channels and the same dtype cost nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import all_gather

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DIMS = 14
_WORDS = _DIMS + 2  # dtype, number of dimensions, sizes; even, as no statistics' message is

# Layer -> what has been agreed on: group, channels, dtype. Not kept in the module: a copy, or one
# that was loaded, asks again.
_agreed: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def agree(layer: nn.Module, name: str, x: Tensor, world: int, group: Any) -> None:
    """Raises a RuntimeError on every rank where the ranks' inputs do not fit together."""
    key = (group, x.size(1), x.dtype)
    agreed = _agreed.setdefault(layer, set())
    if key in agreed:
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read here; a warm-up has run before
    sizes = [*x.shape[:_DIMS], *[0] * (_DIMS - x.dim())]
    header = torch.tensor(
        [_DTYPES.index(x.dtype), x.dim(), *sizes], dtype=torch.int64, device=x.device
    )
    inputs = [_described(words) for words in all_gather(header, world, group).tolist()]
    for rank, (shape, dtype) in enumerate(inputs):
        if (shape[1], dtype) != (inputs[0][0][1], inputs[0][1]):
            raise RuntimeError(
                "SyncBatchNorm: the ranks of the process group do not normalise the same layer. In "
                f"{name}, rank 0 has an input of shape {inputs[0][0]} and {inputs[0][1]}, rank "
                f"{rank} of shape {shape} and {dtype}."
            )
    agreed.add(key)


def _described(words: list[int]) -> tuple[tuple[int, ...], torch.dtype]:
    dtype, dims, *sizes = words
    return tuple(sizes[:dims]), _DTYPES[dtype]
