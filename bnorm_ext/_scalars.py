"""momentum, eps and num_batches_tracked, read as native reads them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_floats(training: bool, momentum: Any, eps: Any, counter: Any) -> tuple[Any, Any]:
    """momentum and eps as the numbers that native makes of them; raises where native does."""
    cumulative = momentum is None and counter is not None
    given = (0.0 if cumulative else momentum, eps)
    if not all(isinstance(value, (int, float)) for value in given):
        F.batch_norm(torch.empty(0, 1), None, None, None, None, training, *given)
    number = float(eps)
    # An eps that is too small stays as it is, because native's error shows it.
    return None if cumulative else float(momentum), eps if number <= 0 else number


def counts_apart(counter: Any, input: Any) -> bool:
    """Whether the counter is a tensor that the operator does not take: not one int64 value on the
    device of ``input``."""
    return (isinstance(counter, Tensor) and isinstance(input, Tensor)) and not (
        counter.dtype is torch.int64 and counter.numel() == 1 and counter.device == input.device
    )


def one_for(counter: Tensor) -> Tensor:
    """1, to be added at the end of a call. Made at its beginning: the number in ``counter.add_(1)``
    becomes a tensor too, for which there may be no memory any more."""
    return torch.ones((), dtype=counter.dtype, device="cpu")


def counted(counter: Tensor) -> Tensor:
    """The value of ``counter`` after ``counter.add_(1)``, without changing it. Raises whatever that
    operation would raise."""
    if (counter.is_inference() and not torch.is_inference_mode_enabled()) or (
        counter.requires_grad and counter.is_leaf and torch.is_grad_enabled()
    ):
        return counter.add_(1)
    given = counter.detach()
    if given.layout is not torch.strided:
        return given.clone().add_(1)
    alike = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return alike.copy_(given).add_(1)
