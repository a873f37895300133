"""What synchronised batch norms send: by the formula, and counted while they run.

Bytes are those that the collectives' results have on one rank, which is what each rank receives at
least; how a backend routes them is its own. A message is one collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bnorm_ext.distributed import collectives

from .nets import batch_norm_inputs

WORLDS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Traffic(NamedTuple):
    """Of a training step, on each rank."""

    sent_bytes: int
    messages: int


def _sum(parts: Sequence[tuple[int, int]]) -> Traffic:
    return Traffic(sum(b for b, _ in parts), sum(m for _, m in parts))


def ours(world: int, channels: Sequence[int]) -> Traffic:
    """Forward and backward of layers with these channels."""
    forward = [collectives.forward_bytes(world, C) for C in channels]
    return _sum(forward + [collectives.backward_bytes(C) for C in channels])


def torchs(world: int, channels: Sequence[int]) -> Traffic:
    """The same with torch.nn.SyncBatchNorm, for input in float32 or 16 bits. It gathers mean,
    inverse standard deviation and count of each rank, and sums two numbers a channel in backward,
    all in float32 (torch/nn/modules/_functions.py)."""
    word = 4
    forward = [(world * (2 * C + 1) * word, 1) for C in channels]
    return _sum(forward + [(2 * C * word, 1) for C in channels])


def channels_of(net: str) -> list[int]:
    """Of each batch norm of a net, in order."""
    return [shape[1] for _, shape in batch_norm_inputs(net, batch=2)]


def megabytes(sent_bytes: int) -> str:
    mb = sent_bytes / 1e6
    return f"{mb:,.0f}" if mb >= 100 else f"{mb:.3g}"


HEAD = ["ranks", "MB", "messages", "widest, MB", "torch's: MB", "messages", "widest, MB"]


def lines(net: str, worlds: Sequence[int] = WORLDS) -> list[list[str]]:
    """A table: a training step's traffic of all batch norms of a net, and of its widest one."""
    channels = channels_of(net)
    found = [HEAD]
    for world in worlds:
        line = [f"{world:,}"]
        for sends in (ours, torchs):
            all_layers, widest = sends(world, channels), sends(world, [max(channels)])
            sizes = [megabytes(t.sent_bytes) for t in (all_layers, widest)]
            line += [sizes[0], str(all_layers.messages), sizes[1]]
        found.append(line)
    return found


# The collectives that batch norms call, and which argument is what comes back.
_COUNTED = ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_reduce")


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of each collective that is called within. DistributedDataParallel's own, which its C++
    part sends, are not among them."""
    found: list[int] = []
    given = {name: getattr(dist, name) for name in _COUNTED if hasattr(dist, name)}

    def counting(call: Any) -> Any:
        def wrapper(result: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
            parts = [result] if isinstance(result, torch.Tensor) else result
            found.append(sum(t.nbytes for t in parts))
            return call(result, *args, **kwargs)

        return wrapper

    try:
        for name, call in given.items():
            setattr(dist, name, counting(call))
        yield found
    finally:
        for name, call in given.items():
            setattr(dist, name, call)
