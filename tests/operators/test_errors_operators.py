"""Direct calls of torch.ops.bnorm_ext.* with tensors that do not fit: an error each time, never a
read or write out of bounds, and nothing changed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bnorm_ext  # noqa: F401  (registers the operators)
from tests.common.cases import DTYPES, accumulation_type

ops = torch.ops.bnorm_ext
C = 5
ERRORS = (RuntimeError, ValueError, NotImplementedError, TypeError)


def x_like(seed: int = 0, shape: tuple[int, ...] = (4, C, 3, 2)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vectors(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(C) for name in names}


ALL = (True, False, True, True)
RUNNING = ("running_mean", "running_var")
#: batch_norm_backward with train=False.
INFERENCE_BACKWARD = "batch_norm_backward, inference"
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "batch_norm_training": lambda: dict(
        x=x_like(), residual=x_like(2), **vectors("weight", "bias", *RUNNING),
        num_batches_tracked=torch.tensor(3), momentum=0.1, eps=1e-5,
    ),
    "batch_norm_inference": lambda: dict(
        x=x_like(), residual=x_like(2), **vectors("weight", "bias", *RUNNING), eps=1e-5
    ),
    "batch_norm_backward": lambda: dict(
        dy=x_like(1), x=x_like(), residual=x_like(2), **vectors("weight", "bias", "mean", "rstd"),
        running_mean=None, running_var=None, train=True, eps=1e-5,
        mask=None, act="identity", negative_slope=0.0, output_mask=ALL,
    ),
    INFERENCE_BACKWARD: lambda: dict(
        dy=x_like(1), x=x_like(), residual=x_like(2), **vectors("weight", "bias", *RUNNING),
        mean=None, rstd=None, train=False, eps=1e-5,
        mask=None, act="identity", negative_slope=0.0, output_mask=ALL,
    ),
    "batch_norm_stats": lambda: {"x": x_like()},
    "batch_norm_merge_stats": lambda: dict(
        mean=torch.zeros(2, C).double(), var=torch.ones(2, C).double(),
        count=torch.ones(2).double(), **vectors(*RUNNING),
        num_batches_tracked=torch.tensor(3), momentum=0.1, eps=1e-5,
        dtype=torch.float32,
    ),
    "batch_norm_apply": lambda: dict(
        x=x_like(), residual=x_like(2), **vectors("weight", "bias", "mean", "rstd")
    ),
    "batch_norm_backward_reduce": lambda: dict(
        dy=x_like(1), x=x_like(), residual=x_like(2), **vectors("weight", "bias", "mean", "rstd"),
        mask=None,
    ),
    "batch_norm_backward_apply": lambda: dict(
        dy=x_like(1), x=x_like(), residual=x_like(2), **vectors("weight", "bias", "mean", "rstd"),
        mask=None, **vectors("mean_dy", "mean_dy_xhat"),
    ),
}  # fmt: skip
#: Of the input's shape and dtype.
LIKE_INPUT = ("x", "dy", "residual")
#: Statistics that forward passes made: exactly (C,), contiguous, of the accumulation type.
MADE = ("mean", "rstd", "mean_dy", "mean_dy_xhat")


def misfits(name: str, good: Tensor) -> dict[str, Any]:
    """What must be refused in the place of ``good``."""
    if name in LIKE_INPUT:
        bad = {
            "one channel less": good[:, :-1],
            "one channel more": torch.cat([good, good[:, :1]], 1),
            "0-d": good.sum(),
            "1-d": good.flatten(),
            "int": good.int(),
            "complex": good.to(torch.complex64),
            "meta": good.to("meta"),
            "sparse": good.to_sparse(),
        }
        if name != "x":
            bad |= {
                "fewer rows": good[:-1],
                "fewer positions": good[..., :1],
                "broadcastable": good[:1],
                "3-d": good.flatten(2),
                "half": good.half(),
                "double": good.double(),
                "empty": good[:0],
            }
        return bad
    if good.dim() == 0:
        return {
            "int32": good.int(),
            "float": good.float(),
            "two": torch.zeros(2, dtype=torch.int64),
            "none": torch.zeros(0, dtype=torch.int64),
            "meta": good.to("meta"),
        }
    bad = {
        "shorter": good[:-1],
        "longer": torch.cat([good, good])[: good.shape[0] + 1],
        "empty": good[:0],
        "0-d": good.sum(),
        "half": good.half(),
        "int": good.long(),
        "bool": good.bool(),
        "other float": good.double() if good.dtype == torch.float32 else good.float(),
        "meta": good.to("meta"),
        "sparse": good.to_sparse(),
    }
    if good.dim() == 2:
        bad |= {"1-d": good[0], "3-d": good[None], "one channel less": good[:, :-1]}
    if name in MADE and good.dim() == 1:
        bad |= {
            "2-d": good[None],
            "strided": torch.ones(2 * C)[::2],
            "expanded": good[:1].expand(C),
        }
    if name in RUNNING:
        bad |= {"2-d": good[None]}
    return bad


def cases() -> list[Any]:
    found = []
    for op, make in GOOD.items():
        for name, good in make().items():
            if isinstance(good, Tensor):
                bad = set(misfits(name, good))
                if op == "batch_norm_stats":  # nothing else there to disagree with
                    bad -= {"one channel less", "one channel more", "meta"}
                for what in sorted(bad):
                    found.append(pytest.param(op, name, what, id=f"{op}-{name}-{what}"))
    return found


def call(op: str, given: dict[str, Any]) -> Any:
    return getattr(ops, op.split(",")[0])(**given)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_call_is_accepted(op):
    call(op, GOOD[op]())


@pytest.mark.parametrize(("op", "name", "what"), cases())
def test_misfit_is_refused(op, name, what):
    good = GOOD[op]()
    given = {**good, name: misfits(name, good[name])[what]}
    before = {n: (t.clone(), t._version) for n, t in good.items() if isinstance(t, Tensor)}
    with pytest.raises(ERRORS):
        call(op, given)
    for n, (t, version) in before.items():
        assert torch.equal(good[n], t), n
        assert good[n]._version == version, n


@pytest.mark.parametrize("op", [op for op in GOOD if "x" in GOOD[op]()])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_statistics_of_another_dtype_than_the_accumulation_type(op, dtype):
    good = GOOD[op]()
    for name in LIKE_INPUT:
        if name in good:
            good[name] = good[name].to(dtype)
    right = accumulation_type(dtype)
    for name, t in good.items():
        if isinstance(t, Tensor) and t.dim() == 1:
            good[name] = t.to(right)
    call(op, good)
    for name in MADE:
        if isinstance(good.get(name), Tensor):
            for wrong in DTYPES:
                if wrong != right:
                    with pytest.raises(RuntimeError, match=name):
                        call(op, {**good, name: good[name].to(wrong)})


@pytest.mark.parametrize("op", [op for op in GOOD if "residual" in GOOD[op]()])
def test_unknown_activation(op):
    for act in ("", "Identity", "gelu", "relu "):
        with pytest.raises(ValueError, match="unknown activation"):
            call(op, {**GOOD[op](), "act": act})


@pytest.mark.parametrize("op", [op for op in GOOD if "mask" in GOOD[op]()])
def test_mask_that_is_not_of_this_input(op):
    right = ops.batch_norm_apply(
        x_like(), x_like(2), None, None, *[torch.ones(C)] * 2, "relu", 0.0, True
    )[1]
    good = {**GOOD[op](), "act": "relu", "mask": right}
    call(op, good)
    for mask in (right[:-1], right.repeat(2), right.char(), right.float(), right[None],
                 right.repeat(2)[::2], right.to("meta")):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"mask must be|is not on the expected"):
            call(op, {**good, "mask": mask})
    for act in ("identity", "silu"):
        with pytest.raises(RuntimeError, match="a mask is of no use"):
            call(op, {**good, "act": act})


@pytest.mark.parametrize("op", ["batch_norm_training", "batch_norm_merge_stats"])
def test_bad_scalars(op):
    for change in ({"eps": 0.0}, {"eps": -1.0}, {"momentum": None, "num_batches_tracked": None}):
        with pytest.raises((ValueError, TypeError)):
            call(op, {**GOOD[op](), **change})
    for half in RUNNING:
        with pytest.raises((ValueError, RuntimeError)):
            call(op, {**GOOD[op](), half: None})


def test_bad_eps_in_inference():
    for op in ("batch_norm_inference", INFERENCE_BACKWARD):
        with pytest.raises(ValueError, match="eps"):
            call(op, {**GOOD[op](), "eps": -1.0})


@pytest.mark.parametrize(
    ("op", "names"),
    [("batch_norm_backward", ("mean", "rstd")), (INFERENCE_BACKWARD, RUNNING)],
)
def test_backward_without_its_statistics(op, names):
    for missing in (names[:1], names[1:], names):
        with pytest.raises(ERRORS):
            call(op, {**GOOD[op](), **dict.fromkeys(missing)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_merge_into_a_dtype_without_kernels(dtype):
    with pytest.raises(ERRORS):
        call("batch_norm_merge_stats", {**GOOD["batch_norm_merge_stats"](), "dtype": dtype})


@pytest.mark.parametrize("counts", [(0.0, 0.0), (1.0, 0.0)])
def test_merging_too_few_values_leaves_running_statistics_finite(counts):
    """All processes had an empty batch, or one value: nothing that may reach the buffers."""
    given = GOOD["batch_norm_merge_stats"]() | {"count": torch.tensor(counts, dtype=torch.float64)}
    with contextlib.suppress(*ERRORS):
        call("batch_norm_merge_stats", given)
    for name in RUNNING:
        assert given[name].isfinite().all(), name


EMPTY = [(0, C, 3, 2), (4, C, 0, 2), (0, C)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("op", [op for op in GOOD if "x" in GOOD[op]()])
def test_empty_input(op, shape):
    given = GOOD[op]()
    for name in LIKE_INPUT:
        if name in given:
            given[name] = torch.empty(shape)
    for t in call(op, given):
        if t is None or t.dtype == torch.uint8:
            continue
        if t.dim() == 1 or t.shape == (2, C):  # per channel; (2, C): a mean
            assert torch.equal(t, torch.zeros_like(t))
            assert t.shape[-1] == C
        else:
            assert t.shape == shape


@pytest.mark.parametrize("name", ["mean", "rstd", "weight", "bias", "mean_dy", "mean_dy_xhat"])
@pytest.mark.parametrize(
    "op", ["batch_norm_apply", "batch_norm_backward", "batch_norm_backward_reduce",
           "batch_norm_backward_apply"],
)  # fmt: skip
def test_empty_input_with_misfitting_vectors(op, name):
    given = GOOD[op]()
    if name not in given:
        pytest.skip("no such argument")
    for n in LIKE_INPUT:
        if n in given:
            given[n] = torch.empty(0, C)
    for size in (C - 1, C + 1, 0):
        with pytest.raises(RuntimeError):
            call(op, {**given, name: torch.ones(size)})


EMPTY_BACKWARD = """
import torch, bnorm_ext
x = torch.empty(0, 3_000_000, requires_grad=True)
few = lambda: torch.ones(3, requires_grad=True)
weight, bias = few(), few()
try:
    y = bnorm_ext.batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, {training})
    y.sum().backward()
except RuntimeError as error:
    print("refused:", error)
else:
    assert weight.grad.tolist() == bias.grad.tolist() == [0, 0, 0]
# The heap is still whole.
held = [torch.randn(n) for n in range(1, 2000, 7)]
del held
"""


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_backward_of_empty_input_writes_no_more_than_there_is(training):
    """Native gives zeros in the size of weight and bias. In a process of its own: a write of three
    million zeros into three places ends it."""
    code = EMPTY_BACKWARD.format(training=training)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert "refused" not in done.stdout, done.stdout
