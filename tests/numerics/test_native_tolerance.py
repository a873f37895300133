"""Numbers, switches and counters of unusual types: what native takes is taken, with its result;
what it refuses is refused, in its words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnorm_ext
from tests.common.twins import outcome

x = torch.linspace(-1, 2, 120, dtype=torch.float64).reshape(4, 5, 3, 2)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


class Float(float):
    pass


class WithIndex:
    def __index__(self) -> int:
        return 1


class WithFloat:
    def __float__(self) -> float:
        return 0.5


NUMBERS: dict[str, Any] = {
    "float": 0.5,
    "subclass of float": Float(0.5),
    "int": 1,
    "int 0": 0,
    "int beyond float": 10**400,
    "True": True,
    "False": False,
    "nan": float("nan"),
    "inf": float("inf"),
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "float16": np.float16(0.5),
    "int64": np.int64(1),
    "bool_": np.bool_(True),
    "complex64": np.complex64(1),
    "array of no dimension": np.array(0.5),
    "array of one": np.array([0.5]),
    "0-d": torch.tensor(0.5),
    "0-d int": torch.tensor(1),
    "0-d bool": torch.tensor(True),
    "0-d complex": torch.tensor(1 + 0j),
    "0-d on meta": torch.tensor(0.5, device="meta"),
    "0-d that requires a gradient": torch.tensor(0.5, requires_grad=True),
    "parameter": nn.Parameter(torch.tensor(0.5)),
    "tensor of one": torch.tensor([0.5]),
    "complex": 1 + 0j,
    "text": "0.5",
    "None": None,
    "list": [0.5],
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal("0.5"),
    "__index__": WithIndex(),
    "__float__": WithFloat(),
}


def assert_same(calls: list[Callable[[], list[Any]]]) -> bool:
    """Whether the second call, native's, is accepted. The first does the same."""
    results: list[list[Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and torch about conversions
        ours, native = (outcome(lambda call=call: results.append(call())) for call in calls)
    assert ours == native
    if native is None:
        for a, b in zip(*results, strict=True):
            # float64 throughout; magnitudes below 10, a few roundings
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, equal_nan=True)
    return native is None


def call(function: Callable[..., Tensor], **changes: Any) -> list[Tensor]:
    given = {
        "running_mean": torch.zeros(5, dtype=torch.float64),
        "running_var": torch.ones(5, dtype=torch.float64),
        **changes,
    }
    y = function(x, **given)
    return [y, given["running_mean"], given["running_var"]]


def call_module(cls: Any, training: Any = True, **attributes: Any) -> list[Tensor]:
    module = cls(5, dtype=torch.float64)
    module.training = training
    for name, value in attributes.items():
        setattr(module, name, value)
    return [module(x), *module.buffers()]


@TRAINING
@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers(value, name, training):
    changes = {"training": training, name: value}
    functions = (bnorm_ext.batch_norm, F.batch_norm)
    accepted = assert_same([partial(call, f, **changes) for f in functions])
    assert accepted == assert_same(
        [
            partial(call, lambda *a, **k: bnorm_ext.batch_norm(*a, act="relu", **k), **changes),
            partial(call, lambda *a, **k: F.relu(F.batch_norm(*a, **k)), **changes),
        ]
    )
    assert_same(
        [partial(call_module, c, **changes) for c in (bnorm_ext.BatchNorm2d, nn.BatchNorm2d)]
    )


def test_numbers_of_numpy_are_no_reason_for_other_kernels():
    """With a mean of 1e4 standard deviations ours and native's differ in many a last place."""
    far = torch.randn(64, 5, 8, 8, generator=torch.Generator().manual_seed(0)) + 1e4
    right = bnorm_ext.batch_norm(far, None, None, training=True, momentum=0.5, eps=2.0**-10)
    native = F.batch_norm(far, None, None, training=True, momentum=0.5, eps=2.0**-10)
    assert not torch.equal(right, native)
    for kind in (np.float64, np.float32, np.float16):
        y = bnorm_ext.batch_norm(
            far, None, None, training=True, momentum=kind(0.5), eps=kind(2.0**-10)
        )
        assert torch.equal(y, right)


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS.keys())
def test_training_is_what_native_takes_for_true(value):
    """By truth value in a module; the function's parser takes bools only."""
    assert_same([partial(call, f, training=value) for f in (bnorm_ext.batch_norm, F.batch_norm)])
    classes = (bnorm_ext.BatchNorm2d, nn.BatchNorm2d)
    assert_same([partial(call_module, c, training=value) for c in classes])
    assert_same([partial(call_module, c, track_running_stats=value) for c in classes])


def test_training_by_truth_value_with_an_activation():
    module = bnorm_ext.BatchNormAct2d(5, dtype=torch.float64)
    module.training = 1  # type: ignore[assignment]
    native = nn.BatchNorm2d(5, dtype=torch.float64)
    torch.testing.assert_close(module(x), F.relu(native(x)), rtol=0, atol=1e-12)
    assert module.num_batches_tracked == 1


# ---- Running statistics -------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_without_memory(name, training):
    """Zeros for which torch stores no values; native does not update them."""
    statistics = [torch._efficientzerotensor(5, dtype=torch.float64) for _ in range(2)]
    assert all(t._is_zerotensor() for t in statistics)
    functions = (bnorm_ext.batch_norm, F.batch_norm)
    assert assert_same(
        [
            lambda f=f, t=t: [v.clone() for v in call(f, training=training, **{name: t})]
            for f, t in zip(functions, statistics, strict=True)
        ]
    )


# ---- Counters -----------------------------------------------------------------------------------

KINDS = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip
COUNTERS: dict[str, Callable[[], Tensor | None]] = {
    **{str(kind)[6:]: lambda kind=kind: torch.tensor(3).to(kind) for kind in KINDS},
    "int8 at its end": lambda: torch.tensor(127, dtype=torch.int8),
    "float16 at its end": lambda: torch.tensor(2048.0).half(),
    "(1,)": lambda: torch.tensor([3]),
    "(1, 1) float": lambda: torch.tensor([[3.0]]),
    "two": lambda: torch.tensor([3, 4]),
    "none": lambda: torch.zeros(0, dtype=torch.int64),
    "nan": lambda: torch.tensor(float("nan")),
    "-1.0": lambda: torch.tensor(-1.0),
    "on meta": lambda: torch.tensor(3, device="meta"),
    "sparse": lambda: torch.tensor([3]).to_sparse(),
    "expanded": lambda: torch.tensor([3]).expand(2),
    "strided": lambda: torch.tensor([3.0, 4.0])[::2],
    "leaf that requires a gradient": lambda: torch.tensor(3.0, requires_grad=True),
    "inference tensor": torch.inference_mode()(lambda: torch.tensor(3)),
    "no counter": lambda: None,
}


def step_with(cls: Any, counter: Tensor | None, momentum: float | None, input: Tensor) -> Any:
    module = cls(5, momentum=momentum, dtype=torch.float64)
    del module.num_batches_tracked
    module.register_buffer("num_batches_tracked", counter)
    y = module(input)
    known = counter is None or counter.is_meta or counter.is_sparse
    return [y, *list(module.buffers())[:2], *([] if known else [counter])]


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("make", COUNTERS.values(), ids=COUNTERS.keys())
def test_counters_of_modules(make, momentum):
    classes = (bnorm_ext.BatchNorm2d, nn.BatchNorm2d)
    assert_same([partial(step_with, c, make(), momentum, x) for c in classes])


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize(
    "name", [name for name in COUNTERS if name not in ("no counter", "on meta", "int64", "(1,)")]
)
def test_a_call_that_fails_has_not_counted(name, momentum):
    counter = COUNTERS[name]()
    assert counter is not None
    before = str(counter)
    with pytest.raises((RuntimeError, TypeError, ValueError, ZeroDivisionError)):
        step_with(bnorm_ext.BatchNorm2d, counter, momentum, x[:, :4])
    assert str(counter) == before


@pytest.mark.parametrize("convert", ["type", "assign"])
def test_module_whose_counter_became_a_float(convert):
    """As `Module.type` and `load_state_dict(assign=True)` leave it; many steps, then backward."""
    ours, native = (c(5, momentum=None) for c in (bnorm_ext.BatchNorm2d, nn.BatchNorm2d))
    for module in (ours, native):
        if convert == "type":
            module.type(torch.float64)
        else:
            loaded = {n: t.double() for n, t in module.state_dict().items()}
            module.load_state_dict(loaded, assign=True)
        assert module.num_batches_tracked.dtype == torch.float64
        for seed in range(3):
            (module(x + seed).square() * x).sum().backward()
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), native.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)
    # sums of 24 terms below 1e2
    torch.testing.assert_close(ours.weight.grad, native.weight.grad, rtol=0, atol=1e-10)


def test_counter_on_the_path_of_native():
    """An empty batch has no kernel; its counter counts in its own dtype all the same."""
    for make in (COUNTERS["float16 at its end"], COUNTERS["int8 at its end"], COUNTERS["bool"]):
        classes = (bnorm_ext.BatchNorm2d, nn.BatchNorm2d)
        assert_same([partial(step_with, c, make(), None, x[:0]) for c in classes])


def test_cumulative_average_on_the_path_of_native(monkeypatch):
    monkeypatch.setattr(bnorm_ext.functional, "_takes_native_path", lambda x: True)
    ours, native = (c(5, momentum=None).double() for c in (bnorm_ext.BatchNorm2d, nn.BatchNorm2d))
    for seed in range(3):
        ours(x + seed), native(x + seed)
    torch.testing.assert_close(dict(ours.state_dict()), dict(native.state_dict()))


def test_counter_that_is_no_tensor():
    for counter in (3, "3", [3]):
        with pytest.raises(TypeError, match="num_batches_tracked must be a Tensor or None"):
            bnorm_ext.batch_norm(x, None, None, training=True, num_batches_tracked=counter)


def test_float_counter_compiled():
    module = bnorm_ext.BatchNorm2d(5).type(torch.float64)
    native = nn.BatchNorm2d(5).type(torch.float64)
    y = torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, native(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(module.named_buffers()), dict(native.named_buffers()))
