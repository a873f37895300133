"""Arguments that lie in each other's memory, or outside of their own storage. Operators refuse them
and have then changed nothing; the function does what native does with buffers that overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext

ops = torch.ops.bnorm_ext
C = 3


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments() -> dict[str, Any]:
    return {
        "x": values(4, C, 2, 2),
        "residual": values(4, C, 2, 2, seed=1),
        "weight": values(C, seed=2),
        "bias": values(C, seed=3),
        "running_mean": values(C, seed=4),
        "running_var": values(C, seed=5).abs(),
        "num_batches_tracked": torch.tensor(3),
        "momentum": 0.1,
        "eps": 1e-5,
    }


def same(a: dict[str, Any]) -> None:
    a["running_var"] = a["running_mean"]


def within(name: str, buffer: str) -> Callable[[dict[str, Any]], None]:
    def change(a: dict[str, Any]) -> None:
        a[buffer] = a[name].flatten()[-C:]

    return change


def expanded(a: dict[str, Any]) -> None:
    a["running_mean"] = values(1).expand(C)


def shifted(a: dict[str, Any]) -> None:
    memory = values(C + 1).abs()
    a["running_mean"], a["running_var"] = memory[:-1], memory[1:]


def crossing_columns(a: dict[str, Any]) -> None:
    """Their strides differ."""
    memory = values(2 * C).abs()
    a["running_mean"], a["running_var"] = memory[:C], memory[::2]


def columns(a: dict[str, Any]) -> None:
    matrix = values(C, 2).abs()
    a["running_mean"], a["running_var"] = matrix[:, 0], matrix[:, 1]


def halves(a: dict[str, Any]) -> None:
    memory = values(2 * C).abs()
    a["running_mean"], a["running_var"] = memory[:C], memory[C:]


def gaps_of_x(a: dict[str, Any]) -> None:
    """Between the elements of x."""
    memory = values(4, C, 2, 4).abs()
    a["x"], a["running_mean"] = memory[..., ::2], memory[0, :, 0, 1]


OVERLAPS = {
    "one tensor": same,
    "expanded": expanded,
    "shifted": shifted,
    "crossing columns": crossing_columns,
    "mean in x": within("x", "running_mean"),
    "var in x": within("x", "running_var"),
    "mean in the residual": within("residual", "running_mean"),
    "var is the weight": within("weight", "running_var"),
    "mean is the bias": within("bias", "running_mean"),
}


def counter_in_the_mean(a: dict[str, Any]) -> None:
    a["num_batches_tracked"] = a["running_mean"][:1].view(torch.int64)


def counter_over_half_of_an_element(a: dict[str, Any]) -> None:
    """In float32: the elements of the mean are at bytes 4, 12 and 20, the counter is at 8 to 15."""
    a |= {n: t.float() for n, t in a.items() if isinstance(t, Tensor) and t.is_floating_point()}
    memory = values(2 * C).abs().float()
    a["running_mean"], a["num_batches_tracked"] = memory[1::2], memory.view(torch.int64)[1]


OF_COUNTERS = {
    "counter in the mean": counter_in_the_mean,
    "counter over half of an element": counter_over_half_of_an_element,
}
APART = {"columns of a matrix": columns, "halves": halves, "gaps of x": gaps_of_x}


def tensors(a: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    return {n: (t.clone(), t._version) for n, t in a.items() if isinstance(t, Tensor)}


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize(
    "change", [*OVERLAPS.values(), *OF_COUNTERS.values()], ids=[*OVERLAPS, *OF_COUNTERS]
)
def test_buffers_that_overlap(change, negated):
    given = arguments()
    change(given)
    if negated:
        given = {n: torch._neg_view(t) if n.startswith("running") else t for n, t in given.items()}
    before = tensors(given)
    with pytest.raises(RuntimeError, match="share memory"):
        ops.batch_norm_training(**given)
    for name, (values, version) in before.items():
        assert torch.equal(given[name], values), name
        assert given[name]._version == version, name


@pytest.mark.parametrize("change", APART.values(), ids=APART.keys())
def test_buffers_in_one_storage_that_do_not_overlap(change):
    given, plain = arguments(), arguments()
    change(given)
    plain |= {n: t.clone() for n, t in given.items() if isinstance(t, Tensor)}
    for got, right in zip(
        ops.batch_norm_training(**given), ops.batch_norm_training(**plain), strict=True
    ):
        assert torch.equal(got, right)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(given[name], plain[name]), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("change", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_function_does_as_native(change, act):
    """On one thread, because native's result depends on which channel comes first."""
    results = []
    for native in (False, True):
        a = arguments()
        change(a)
        statistics = (a["running_mean"], a["running_var"], a["weight"], a["bias"], True)
        if native:
            y = F.batch_norm(a["x"], *statistics) + a["residual"]
            y = y if act is None else F.relu(y)
        else:
            y = bnorm_ext.batch_norm(
                a["x"], *statistics, residual=a["residual"], act=act,
                num_batches_tracked=a["num_batches_tracked"],
            )  # fmt: skip
            assert a["num_batches_tracked"] == 4
        results.append([y, *statistics[:2]])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [n for n, t in arguments().items() if isinstance(t, Tensor)])
@pytest.mark.parametrize("left", [0, 4])
def test_less_memory_than_elements(name, left):
    """As `UntypedStorage.resize_` leaves a tensor."""
    given = arguments()
    given[name].untyped_storage().resize_(left)
    before = tensors({n: t for n, t in given.items() if n != name})
    with pytest.raises(RuntimeError, match="outside of its storage"):
        ops.batch_norm_training(**given)
    function = {n: t for n, t in given.items() if n != "x"}
    with pytest.raises(RuntimeError, match="outside of its storage"):
        bnorm_ext.batch_norm(given["x"], training=True, **function)
    for n, (values, version) in before.items():
        assert torch.equal(given[n], values), n
        assert given[n]._version == version, n


def test_less_memory_than_elements_in_backward():
    x, dy = values(4, C, 2, 2), values(4, C, 2, 2, seed=1)
    for name in ("dy", "x", "weight", "mean", "rstd"):
        given = {
            "dy": dy.clone(), "x": x.clone(), "weight": values(C), "mean": values(C),
            "rstd": values(C),
        }  # fmt: skip
        given[name].untyped_storage().resize_(8)
        with pytest.raises(RuntimeError, match="outside of its storage"):
            ops.batch_norm_backward(
                given["dy"], given["x"], None, given["weight"], None, None, None, given["mean"],
                given["rstd"], True, 1e-5, None, "identity", 0.0, (True, False, True, True),
            )  # fmt: skip


@pytest.mark.parametrize(
    "counts",
    [(5.0, -2.0), (float("inf"), 1.0), (float("nan"), 2.0), (1e300, 1.0), (1.5, 0.25)],
    ids=str,
)
def test_merging_counts_that_are_none(counts):
    mean, var = torch.zeros(C), torch.ones(C)
    with pytest.raises(ValueError, match="expected"):
        ops.batch_norm_merge_stats(
            torch.zeros(2, C, dtype=torch.float64), torch.ones(2, C, dtype=torch.float64),
            torch.tensor(counts, dtype=torch.float64), mean, var, None, 0.1, 1e-5, torch.float32,
        )  # fmt: skip
    assert torch.equal(mean, torch.zeros(C))
    assert torch.equal(var, torch.ones(C))
