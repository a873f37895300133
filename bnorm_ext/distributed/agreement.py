"""The check that all ranks run the same layer, at its first call in a process group.

Collectives of different sizes would end in an error of the backend that names no layer, or wait for
the time-out. So the ranks first exchange a message of fixed size that says what they are about to
normalise. Later calls of the layer with as many channels and the same dtype send nothing.
"""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._compat import process_group_named
from .collectives import all_gather

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DIMS = 12
_MAGIC = 0x626E6F726D  # tells the message from statistics, which a rank elsewhere would send
_WORDS = _DIMS + 4  # magic, layer, dtype, number of dimensions, sizes; even, unlike statistics

# Process group -> what its ranks have agreed on: layer, channels, dtype.
_agreed: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


# An operator, so that a compiled graph, an eager call and the recomputation of a checkpoint do the
# same, whichever of them comes first. The count is its result, so that no compiler drops it.
@torch.library.custom_op("bnorm_ext::agreed_count", mutates_args=())
def agreed_count(x: Tensor, layer: str, group_name: str) -> Tensor:
    """The values per channel of this rank, (1,) in double on the device of ``x``.

    Raises:
        RuntimeError: on every rank, where the ranks' inputs do not fit together.
    """
    group = process_group_named(group_name)
    if group is not None:
        agreed = _agreed.setdefault(group, set())
        key = (layer, x.size(1), x.dtype)
        # Nothing can be read while a CUDA graph is captured; a warm-up has run before.
        if key not in agreed and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            _agree(x, layer, group)
            agreed.add(key)
    return x.new_full((1,), x.numel() // x.size(1), dtype=torch.double)


@agreed_count.register_fake
def _(x: Tensor, layer: str, group_name: str) -> Tensor:
    return x.new_empty((1,), dtype=torch.double)


def _agree(x: Tensor, layer: str, group: Any) -> None:
    sizes = [*x.shape[:_DIMS], *[0] * (_DIMS - x.dim())]
    own = [_MAGIC, zlib.crc32(layer.encode()), DTYPES.index(x.dtype), x.dim(), *sizes]
    header = torch.tensor(own, dtype=torch.int64, device=x.device)
    headers = all_gather(header, dist.get_world_size(group), group).tolist()
    for rank, words in enumerate(headers):
        if words[0] != _MAGIC:
            raise RuntimeError(
                f"SyncBatchNorm: rank {rank} of the process group runs something else while "
                f"{_described(own)} is normalised by {layer} here."
            )
        if words[1:3] != headers[0][1:3] or words[5] != headers[0][5]:
            raise RuntimeError(
                "SyncBatchNorm: the ranks of the process group do not normalise the same layer. In "
                f"layer {layer}, rank 0 has {_described(headers[0])}, rank {rank} has "
                f"{_described(words)}{'' if words[1] == own[1] else ' in another layer'}."
            )


def _described(words: list[int]) -> str:
    _, _, dtype, dims, *sizes = words
    return f"an input of shape {tuple(sizes[:dims])} and {DTYPES[dtype]}"
