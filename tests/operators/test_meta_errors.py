"""On the meta device, where no kernel sees the arguments, a call that native refuses is refused in
its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext
from tests.common.twins import outcome


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(**changes: Any) -> dict[str, Any]:
    vectors = ("running_mean", "running_var", "weight", "bias")
    return {"input": meta(4, 5, 3, 2), **{n: meta(5) for n in vectors}, "eps": 1e-5, **changes}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "good": arguments,
    "half with float": lambda: arguments(input=meta(4, 5, dtype=torch.float16)),
    "mean too long": lambda: arguments(running_mean=meta(6)),
    "var too short": lambda: arguments(running_var=meta(4)),
    "weight too long": lambda: arguments(weight=meta(6)),
    "bias too short": lambda: arguments(bias=meta(4)),
    "no statistics": lambda: arguments(running_mean=None, running_var=None),
    "mean alone": lambda: arguments(running_var=None),
    "int": lambda: arguments(input=meta(4, 5, dtype=torch.int64)),
    "bool": lambda: arguments(input=meta(4, 5, dtype=torch.bool)),
    "one value per channel": lambda: arguments(input=meta(1, 5, 1, 1)),
    "eps 0": lambda: arguments(eps=0.0),
    "mean on another device": lambda: arguments(running_mean=torch.zeros(5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_as_native(make, training):
    given = {**make(), "training": training}
    native = outcome(lambda: F.batch_norm(**given))
    assert outcome(lambda: bnorm_ext.batch_norm(**given)) == native
    assert outcome(lambda: bnorm_ext.batch_norm(**given, act="relu")) == native


def test_residual_of_another_shape():
    with pytest.raises(RuntimeError, match="residual must be like the input"):
        bnorm_ext.batch_norm(**arguments(), training=True, residual=meta(4, 5, 3, 1))


def test_cumulative_average():
    """The counter stays where it is; native would have to read it."""
    y = bnorm_ext.batch_norm(
        **arguments(), training=True, momentum=None,
        num_batches_tracked=torch.zeros((), dtype=torch.int64, device="meta"),
    )  # fmt: skip
    assert y.shape == (4, 5, 3, 2)
