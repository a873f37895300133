"""What is known of a GPU, and of the other processes, before a call takes the CUDA kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._load import load, warn_without_code

_compiled: Any = load()
_AVAILABLE = dist.is_available()
_has_code: dict[int, bool] = {}  # by the number of the GPU


def has_code(input: Tensor) -> bool:
    """Whether the kernels are compiled for the GPU of this CUDA tensor. If not, says so once. For
    eager calls, since it also looks at the processes."""
    notice_processes()
    index = input.device.index  # a tensor's device always has a number
    known = _has_code.get(index)
    return _ask(index) if known is None else known


def _ask(index: int) -> bool:
    with torch.cuda.device(index):
        known = _has_code[index] = bool(_compiled.has_code())
    if not known:
        warn_without_code(
            torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        )
    return known


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_code_while_tracing(index: int) -> bool:
    """The same for GPU number `index` while torch.compile traces, whose graph has one path or the
    other."""
    known = _has_code.get(index)
    return _ask(index) if known is None else known


def _nobody() -> None:
    return None


_seen: Callable[[], Any] = _nobody  # a weak reference to the default process group


def notice_processes() -> None:
    """Tells the plans whether ``torch.distributed`` has more than one rank at this moment.

    Torch calls nobody when a process group comes or goes, so each eager call on a CUDA tensor looks
    (one comparison), and so does each compilation of a graph. A graph that was compiled before
    ``init_process_group`` runs as before until one of them happens.
    """
    global _seen
    everyone = dist.group.WORLD if _AVAILABLE else None
    if everyone is _seen():
        return
    # A weak reference: a process group ends with the last strong one.
    _seen = _nobody if everyone is None else weakref.ref(everyone)
    _compiled.set_beside_collectives(processes() > 1)


def processes() -> int:
    """How many ranks ``torch.distributed`` has; 1 where it is not initialised."""
    return dist.get_world_size() if _AVAILABLE and dist.is_initialized() else 1
