"""A call that native refuses is refused with the same exception type and text, and has changed
nothing; a call that native accepts is accepted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnorm_ext
from tests.common.cases import DTYPES
from tests.common.twins import outcome

f32, f64, f16 = torch.float32, torch.float64, torch.float16


def arguments(shape: tuple[int, ...] = (4, 5, 3, 2), **changes: Any) -> dict[str, Any]:
    """Of a good call; ``changes`` make it a bad one."""
    given = {
        "input": torch.linspace(-1, 2, torch.Size(shape).numel()).reshape(shape),
        "running_mean": torch.zeros(5),
        "running_var": torch.ones(5),
        "weight": torch.ones(5),
        "bias": torch.zeros(5),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return {**given, **changes}


Make = Callable[[], dict[str, Any]]
VECTORS = ["running_mean", "running_var", "weight", "bias"]
x = torch.ones(4, 5, 3, 2)

BAD: dict[str, Make] = {
    "0-d": lambda: arguments(()),
    "1-d": lambda: arguments((5,)),
    "0-d, no parameters": lambda: arguments((), **dict.fromkeys(VECTORS)),
    "wrong channels": lambda: arguments((4, 6, 3, 2)),
    "channels in the wrong place": lambda: arguments((4, 3, 2, 5)),
    "one value per channel": lambda: arguments((1, 5)),
    "one value per channel, 4-d": lambda: arguments((1, 5, 1, 1)),
    "one value per channel, one channel": lambda: arguments(
        (1, 1), **dict.fromkeys(VECTORS, torch.ones(1))
    ),
    "one value per channel, bad eps": lambda: arguments((1, 5), eps=-1.0),
    "one value per channel, bad sizes": lambda: arguments((1, 5), weight=torch.ones(4)),
    "eps 0": lambda: arguments(eps=0.0),
    "eps int 0": lambda: arguments(eps=0),
    "eps -1": lambda: arguments(eps=-1.0),
    "eps -inf": lambda: arguments(eps=-float("inf")),
    "eps None": lambda: arguments(eps=None),
    "eps text": lambda: arguments(eps="1e-5"),
    "eps tensor of two": lambda: arguments(eps=torch.tensor([1e-5, 1e-5])),
    "momentum text": lambda: arguments(momentum="0.1"),
    "momentum complex": lambda: arguments(momentum=0.1j),
    "running_mean alone": lambda: arguments(running_var=None),
    "running_var alone": lambda: arguments(running_mean=None),
    "input list": lambda: arguments(input=[1.0, 2.0]),
    "input None": lambda: arguments(input=None),
    "input number": lambda: arguments(input=3.0),
    "input int32": lambda: arguments(input=x.int()),
    "input int64": lambda: arguments(input=x.long()),
    "input uint8": lambda: arguments(input=x.byte()),
    "input bool": lambda: arguments(input=x.bool()),
    "input complex64": lambda: arguments(input=x.to(torch.complex64)),
    "input complex128": lambda: arguments(input=x.to(torch.complex128)),
    "input float8": lambda: arguments(input=x.to(torch.float8_e4m3fn)),
    "input float8, no parameters": lambda: arguments(
        input=x.to(torch.float8_e5m2), **dict.fromkeys(VECTORS)
    ),
    "input sparse": lambda: arguments(input=x.to_sparse()),
    "input csr": lambda: arguments(input=torch.ones(4, 5).to_sparse_csr()),
    "input quantized": lambda: arguments(
        input=torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    ),
    "all int64": lambda: arguments(
        input=x.long(), **dict.fromkeys(VECTORS, torch.ones(5, dtype=torch.int64))
    ),
    "all complex64": lambda: arguments(
        input=x.to(torch.complex64), **dict.fromkeys(VECTORS, torch.ones(5, dtype=torch.complex64))
    ),
    "buffer that requires a gradient": lambda: arguments(
        running_mean=torch.zeros(5, requires_grad=True)
    ),
    "empty, eps -1": lambda: arguments((0, 5, 3, 2), eps=-1.0),
    "empty, eps 0": lambda: arguments((0, 5), eps=0.0),
    "empty, 1-d": lambda: arguments((0,), **dict.fromkeys(VECTORS)),
    "empty, no channels, no rows but one": lambda: arguments((1, 0)),
    "empty, half of the statistics": lambda: arguments((0, 5), running_var=None),
    "no channels, no parameters": lambda: arguments((4, 0), **dict.fromkeys(VECTORS)),
}  # fmt: skip
for name in VECTORS:
    for what, vector in {
        "too short": torch.ones(4),
        "too long": torch.ones(6),
        "empty": torch.ones(0),
        "0-d": torch.tensor(1.0),
        "2-d (1, C)": torch.ones(1, 5),
        "2-d (C, 1)": torch.ones(5, 1),
        "2-d, strided": torch.ones(5, 2)[:, :1],
        "strided": torch.ones(10)[::2],
        "expanded": torch.ones(1).expand(5),
        "float64": torch.ones(5, dtype=f64),
        "float16": torch.ones(5, dtype=f16),
        "int64": torch.ones(5, dtype=torch.int64),
        "bool": torch.ones(5, dtype=torch.bool),
        "complex": torch.ones(5, dtype=torch.complex64),
        "sparse": torch.ones(5).to_sparse(),
        "on meta": torch.ones(5, device="meta"),
        "a list": [1.0] * 5,
        "a number": 1.0,
        "None": None,
    }.items():
        BAD[f"{name} {what}"] = lambda name=name, vector=vector: arguments(**{name: vector})
        # Native returns early for an empty input. What it then does with a complex weight, say, is
        # an accident of the few operations that are left; sizes and dtypes it does not look at.
        if what in ("too short", "too long", "strided", "float64", "float16", "None"):
            BAD[f"{name} {what}, empty"] = lambda name=name, vector=vector: arguments(
                (0, 5, 3, 2), **{name: vector}
            )


def fresh(given: dict[str, Any]) -> dict[str, Any]:
    """The buffers copied with their strides, so that a call cannot spoil the next one."""

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type == "meta":
            return t
        return t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)

    return {n: copy(t) if n.startswith("running") else t for n, t in given.items()}


def snapshot(given: dict[str, Any]) -> list[tuple[str, int, Any]]:
    return [
        (n, t._version, t.detach().to_dense().tolist() if t.device.type != "meta" else None)
        for n, t in given.items()
        if isinstance(t, Tensor) and n != "input"
    ]


def assert_like_native(make: Make) -> bool:
    """Whether native accepts the call. Ours does the same, with the same result or exception."""
    results: list[Tensor] = []
    outcomes = []
    for function in (F.batch_norm, bnorm_ext.batch_norm):
        given = fresh(make())
        if function is bnorm_ext.batch_norm:
            given["num_batches_tracked"] = torch.tensor(7)
        before = snapshot(given)
        outcomes.append(outcome(lambda f=function, g=given: results.append(f(**g))))
        if outcomes[-1] is not None and function is bnorm_ext.batch_norm:
            assert snapshot(given) == before
    assert outcomes[1] == outcomes[0]
    if outcomes[0] is None:
        native, ours = results
        assert (ours.dtype, ours.shape, ours.device) == (native.dtype, native.shape, native.device)
        if native.device.type != "meta":
            # Both round a few times; a wrong rule shows as a difference of the size of the values.
            torch.testing.assert_close(ours, native, rtol=2e-2, atol=2e-2, equal_nan=True)
    return outcomes[0] is None


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_calls(make, training):
    assert_like_native(lambda: {**make(), "training": training})


@pytest.mark.parametrize("training", [1, 0, None, "yes", torch.tensor(True)], ids=str)
def test_training_that_is_no_bool(training):
    assert_like_native(lambda: arguments(training=training))


@pytest.mark.parametrize("value", [1, True, torch.tensor(0.5), float("nan"), float("inf")], ids=str)
def test_scalars_that_native_takes(value):
    for name in ("momentum", "eps"):
        for training in (True, False):
            assert assert_like_native(
                lambda n=name, t=training: arguments(training=t, **{n: value})
            )


def test_positional_and_missing_arguments():
    good = arguments()
    for count in range(len(good) + 1):
        values = list(good.values())[:count]
        ours, native = (outcome(partial(f, *values)) for f in (bnorm_ext.batch_norm, F.batch_norm))
        if native is None:
            assert ours is None
        else:
            assert ours is not None
            assert ours[0] is native[0]
            if count > 0:
                assert ours[1] == native[1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_mixture_of_dtypes(dtype, training):
    """All 5^4 combinations of None and the four dtypes for the four vectors."""
    kinds = [None, *DTYPES]
    accepted = []
    for mix in itertools.product(kinds, repeat=4):
        vectors = {
            n: None if kind is None else torch.ones(5, dtype=kind)
            for n, kind in zip(VECTORS, mix, strict=True)
        }
        good = assert_like_native(
            lambda v=vectors: arguments(input=x.to(dtype), training=training, **v)
        )
        accepted.append(good)
    # Neither everything nor nothing: the comparison has met both kinds.
    assert any(accepted)
    assert not all(accepted)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_ranks_that_native_functions_take(training):
    for shape in [(4, 5), (4, 5, 2), (4, 5, 2, 2, 2), (4, 5, 1, 2, 1, 2), (1, 5, 1, 1, 1, 1, 2)]:
        assert assert_like_native(lambda s=shape: arguments(s, training=training))


# ---- What only ours has: the counter ------------------------------------------------------------


@pytest.mark.parametrize(
    "counter",
    [
        torch.tensor(False),
        torch.tensor(0.0, requires_grad=True),
        torch.tensor([0]).expand(2),
        torch.tensor([0]).to_sparse(),
        3,
    ],
    ids=str,
)
def test_bad_counters(counter):
    given = arguments(num_batches_tracked=counter)
    before = snapshot(given)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        bnorm_ext.batch_norm(**given)
    assert snapshot(given) == before


def test_cumulative_average_needs_the_counter():
    given = arguments(momentum=None)
    before = snapshot(given)
    with pytest.raises(TypeError):
        bnorm_ext.batch_norm(**given)
    assert snapshot(given) == before


# ---- Modules ------------------------------------------------------------------------------------

MODULE_INPUTS: dict[str, Callable[[], Any]] = {
    **{f"{d}-d": lambda d=d: torch.ones([4, 5, 2, 2, 2, 2][:d]) for d in range(7)},
    "channels": lambda: torch.ones(4, 6, 2, 2),
    "single": lambda: torch.ones(1, 5, 1, 1),
    "int": lambda: x.long(),
    "complex": lambda: x.to(torch.complex64),
    "double": lambda: x.double(),
    "half": lambda: x.half(),
    "meta": lambda: x.to("meta"),
    "sparse": lambda: x.to_sparse(),
    "empty": lambda: x[:0],
    "no tensor": lambda: "x",
}


@pytest.mark.parametrize("make", MODULE_INPUTS.values(), ids=MODULE_INPUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_modules(make, dtype, training):
    for kwargs in ({}, {"momentum": None}, {"eps": 0.0}, {"affine": False}):
        for dims in (1, 2, 3):
            native = getattr(nn, f"BatchNorm{dims}d")(5, dtype=dtype, **kwargs).train(training)
            ours = getattr(bnorm_ext, f"BatchNorm{dims}d")(5, dtype=dtype, **kwargs).train(training)
            before = {n: (t.clone(), t._version) for n, t in ours.named_buffers()}
            expected = outcome(lambda m=native: m(make()))
            assert outcome(lambda m=ours: m(make())) == expected
            for n, t in ours.named_buffers():
                assert t.dtype == before[n][0].dtype
                if expected is not None:
                    assert torch.equal(t, before[n][0]), n
                    assert t._version == before[n][1], n


def test_an_activation_that_fails_has_not_counted():
    """Native takes an empty batch of any dtype, its activations do not."""
    counter = torch.tensor(7)
    with pytest.raises(RuntimeError, match="not implemented"):
        bnorm_ext.batch_norm(
            x.long()[:0], torch.zeros(5), torch.ones(5), training=True, act="leaky_relu",
            num_batches_tracked=counter,
        )  # fmt: skip
    assert counter == 7


def test_arguments_without_kernels_are_native():
    """In inference native takes a running variance of whole numbers for an input with gaps."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))[:, ::2]
    mean, var = torch.tensor([1.0, 3.0]), torch.tensor([4, 2])
    right = F.batch_norm(x, mean, var)
    assert torch.equal(bnorm_ext.batch_norm(x, mean, var), right)
