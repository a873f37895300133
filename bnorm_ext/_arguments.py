"""The argument list of `functional.batch_norm` as one value, which its ways through the package
hand on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """In the order of :func:`torch.nn.functional.batch_norm`, then what this package adds."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: Any  # float | None, once it has been checked
    eps: Any  # float
    num_batches_tracked: Tensor | None = None
    residual: Tensor | None = None
    act: str = "identity"  # a name in `activations.NAMES`
    negative_slope: float = 0.01
