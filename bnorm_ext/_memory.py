"""Where the arguments of a call lie in memory: what the operator refuses for that alone. Asked only
after a call has failed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._arguments import Arguments
from ._load import load

_compiled: Any = load()


def lacks_memory(call: Arguments) -> bool:
    """Whether elements of an argument lie outside of its storage, as
    ``UntypedStorage.resize_`` leaves it."""
    return _compiled is not None and any(
        _compiled.lacks_memory(t) for t in call if isinstance(t, Tensor)
    )


def has_unwritable_buffers(call: Arguments) -> bool:
    """Whether a running statistic is a tensor that the operator does not update: one of torch's
    zero tensors, which native leaves as they are, or one that shares memory with itself or another
    argument, which native updates channel by channel."""
    buffers = (call.running_mean, call.running_var)
    if any(map(_is_zero_tensor, buffers)):
        return True
    counter = call.num_batches_tracked if call.training else None
    read = [call.input, call.residual, call.weight, call.bias]
    return not (_compiled is None or _compiled.are_apart([*buffers, counter], read))


def _is_zero_tensor(t: Any) -> bool:
    try:
        return isinstance(t, Tensor) and t.numel() > 0 and t.data_ptr() == 0
    except RuntimeError:  # a tensor of a transform, which has no storage
        return False
