"""The modules do in every mode what torch's own do: outputs, gradients, buffers, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.common.twins import (
    FLOAT64,
    HAS_BIAS_ARGUMENT,
    NATIVE,
    NO_BIAS,
    OURS,
    SHAPES,
    assert_same,
    outcome,
    state,
    step,
    twins,
)

DIMS = [1, 2, 3]

CONFIGS = {
    "default": {},
    "momentum-none": {"momentum": None},
    "momentum-zero": {"momentum": 0.0},
    "momentum-one": {"momentum": 1.0},
    "momentum-int": {"momentum": 1},
    "momentum-negative": {"momentum": -0.3},
    "momentum-above-one": {"momentum": 1.7},
    "large-eps": {"eps": 0.5},
    "no-affine": {"affine": False},
    "no-tracking": {"track_running_stats": False},
    "no-tracking-momentum-none": {"track_running_stats": False, "momentum": None},
    "no-affine-no-tracking": {"affine": False, "track_running_stats": False},
    **dict(zip(["no-bias"], NO_BIAS, strict=False)),
}


def batches(dims, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[dims]
    for _ in range(count):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
        yield x, torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_twins_agree(ours, native, dims, count=2, seed=0):
    for x, dy in batches(dims, count, seed):
        assert_same(step(ours, x, dy), step(native, x, dy))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dims", DIMS)
def test_train_then_eval_then_train(dims, config):
    ours, native = twins(dims, **config)
    for training in (True, False, True):
        ours.train(training), native.train(training)
        assert_twins_agree(ours, native, dims, seed=int(training))


def test_3d_input_of_batchnorm1d():
    ours, native = twins(1)
    x, dy = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    assert_same(step(ours, x, dy), step(native, x, dy))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_tracking_turned_off_and_on_later(momentum):
    ours, native = twins(2, momentum=momentum)
    assert_twins_agree(ours, native, 2, seed=1)
    for tracking, training in ((False, True), (False, False), (True, True), (True, False)):
        for module in (ours, native):
            module.track_running_stats = tracking
            module.train(training)
        before = state(ours)
        assert_twins_agree(ours, native, 2, seed=2)
        # The case has teeth only if the counter moves exactly when training and tracking are on.
        moved = int(ours.num_batches_tracked - before["num_batches_tracked"])
        assert moved == (2 if tracking and training else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "removed",
    [("num_batches_tracked",), ("running_mean", "running_var"), ("weight",), ("bias",)],
)
def test_parameters_and_buffers_set_to_none_later(removed, momentum, training):
    ours, native = twins(2, momentum=momentum)
    for module in (ours, native):
        for name in removed:
            setattr(module, name, None)
        module.train(training)
    assert_twins_agree(ours, native, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("removed", ["running_mean", "running_var"])
def test_one_statistic_alone_is_natives_error(removed, training):
    ours, native = twins(2)
    x, _ = next(batches(2, 1))
    for module in (ours, native):
        setattr(module, removed, None)
        module.train(training)
    assert outcome(lambda: ours(x)) == outcome(lambda: native(x)) is not None


def test_buffers_without_tracking_are_used_in_eval_but_never_changed():
    """Running statistics may be put into a module that was built without tracking."""
    ours, native = twins(2, track_running_stats=False)
    for module in (ours, native):
        module.running_mean = torch.full((5,), 0.5, dtype=torch.float64)
        module.running_var = torch.full((5,), 4.0, dtype=torch.float64)
        module.eval()
    assert_twins_agree(ours, native, 2)
    for module in (ours, native):
        module.train()
    assert_twins_agree(ours, native, 2)
    assert torch.equal(ours.running_mean, torch.full((5,), 0.5, dtype=torch.float64))


def test_attributes_changed_later_are_honoured():
    ours, native = twins(2)
    for module in (ours, native):
        module.momentum = 0.7
        module.eps = 0.2
    assert_twins_agree(ours, native, 2)


def test_counter_counts_training_calls_only():
    module = OURS[2](5)
    x = torch.randn(SHAPES[2])
    module(x), module(x)
    module.eval()(x)
    assert module.num_batches_tracked.item() == 2
    assert module.num_batches_tracked.dtype == torch.int64


def test_cumulative_average_is_the_mean_of_the_batches():
    module = OURS[2](5, momentum=None, dtype=torch.float64)
    data = [x for x, _ in batches(2, 5)]
    for x in data:
        module(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(module.running_mean, means, **FLOAT64)
    torch.testing.assert_close(module.running_var, variances, **FLOAT64)


def test_reset_running_stats_starts_anew():
    ours, native = twins(2, momentum=None)
    assert_twins_agree(ours, native, 2)
    ours.reset_running_stats(), native.reset_running_stats()
    assert ours.num_batches_tracked.item() == 0
    assert_twins_agree(ours, native, 2, seed=3)
    ours.reset_parameters(), native.reset_parameters()
    assert_twins_agree(ours, native, 2, seed=4)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_get_no_gradient(training):
    ours, native = twins(2)
    for module in (ours, native):
        module.train(training)
        module.weight.requires_grad_(False)
    x, dy = next(batches(2, 1))
    seen = step(ours, x, dy)
    assert "dweight" not in seen
    assert "dbias" in seen
    assert_same(seen, step(native, x, dy))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("half_parameters", [True, False])
@pytest.mark.parametrize("inputs", [torch.float16, torch.bfloat16])
def test_low_precision(inputs, half_parameters, training):
    """``.half()`` and ``.bfloat16()`` as native; float32 parameters under 16-bit input as well."""
    parameters = inputs if half_parameters else torch.float32
    ours, native = twins(2, dtype=torch.float32)
    ours.to(parameters), native.to(parameters)
    ours.train(training), native.train(training)
    assert ours.weight.dtype == parameters
    for x, dy in batches(2, 2):
        x, dy = x.to(inputs), dy.to(inputs)
        a, b = step(ours, x, dy), step(native, x, dy)
        # Both compute in float32 and round every result once, so they differ by one rounding
        # step, 2 * u of a value's magnitude; u = 2**-11 for float16, 2**-8 for bfloat16. Running
        # statistics in 16 bit: some versions of native round three times in an update, ours once,
        # and there are two updates: (3 + 1) * 2 * u. float32 results are sums of at most 72 terms
        # of rounded values below 50: 72 * 2**-24 * 50.
        for name in b:
            assert a[name].dtype == b[name].dtype, name
            u = torch.finfo(inputs).eps / 2
            wide = name == "num_batches_tracked" or a[name].dtype == torch.float32
            scale = b[name].abs().max().item()
            roundings = 8 if name.startswith("running") else 2
            atol = 72 * 2.0**-24 * 50 if wide else roundings * u * scale
            torch.testing.assert_close(
                a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    ours, native = twins(2)
    for x, dy in batches(2, 1):
        x = x.to(memory_format=memory_format)
        seen = step(ours, x, dy)
        assert seen["y"].is_contiguous(memory_format=memory_format)
        assert_same(seen, step(native, x, dy))


BAD_INPUTS = {
    "rank-too-low": lambda: torch.randn(5),
    "rank-too-high": lambda: torch.randn(1, 5, 2, 2, 2, 2),
    "wrong-channels": lambda: torch.randn(4, 6, 2, 2),
    "one-value-per-channel": lambda: torch.randn(1, 5, 1, 1),
    "integer": lambda: torch.ones(4, 5, 2, 2, dtype=torch.int64),
    "complex": lambda: torch.ones(4, 5, 2, 2, dtype=torch.complex64),
    "wider-than-parameters": lambda: torch.randn(4, 5, 2, 2, dtype=torch.float64),
    "no-tensor": lambda: [1.0, 2.0],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_gets_native_error_and_changes_nothing(make, training):
    ours, native = twins(2, dtype=torch.float32)
    ours.train(training), native.train(training)
    before = state(ours)
    x = make()
    expected = outcome(lambda: native(x))
    assert expected is not None or make is BAD_INPUTS["one-value-per-channel"]  # fine in eval
    assert outcome(lambda: ours(x)) == expected
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("rank", range(1, 7))
def test_rank_check_is_native(dims, rank):
    ours, native = twins(dims, dtype=torch.float32)
    x = torch.randn([5] * rank)
    assert outcome(lambda: ours(x)) == outcome(lambda: native(x))


def test_one_value_per_channel_raises_natives_text():
    module = OURS[1](5)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
        module(torch.randn(1, 5))
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.running_var, torch.ones(5))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_wrong_sizes_get_native_error_and_change_nothing(name):
    ours, native = twins(2, dtype=torch.float32)
    for module in (ours, native):
        wrong = torch.ones(4)
        setattr(module, name, nn.Parameter(wrong) if name in ("weight", "bias") else wrong)
    before = state(ours)
    x = torch.randn(SHAPES[2])
    expected = outcome(lambda: native(x))
    assert expected is not None
    assert outcome(lambda: ours(x)) == expected
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("arguments", [(), (1, 2, 3)])
def test_wrong_arguments_raise_type_error(arguments):
    with pytest.raises(TypeError, match="forward"):
        OURS[2](5)(*arguments)


def test_input_by_keyword():
    ours, native = twins(2)
    x, _ = next(batches(2, 1))
    torch.testing.assert_close(ours(input=x), native(input=x), **FLOAT64)


@pytest.mark.parametrize("dims", DIMS)
def test_constructor_arguments_are_natives(dims):
    """Positional order, defaults and attributes."""
    arguments = (5, 1e-3, 0.2, False, False, "cpu", torch.float64)
    for args in ((5,), arguments):
        ours, native = OURS[dims](*args), NATIVE[dims](*args)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(ours, name) == getattr(native, name)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in native.named_parameters()]
        assert {n: b.dtype for n, b in ours.named_buffers()} == {
            n: b.dtype for n, b in native.named_buffers()
        }
        assert repr(ours) == repr(native)
        assert isinstance(ours, NATIVE[dims])
    assert outcome(lambda: OURS[dims]()) is not None
    refused = outcome(lambda: OURS[dims](5, bias=False)) is not None
    assert refused == (not HAS_BIAS_ARGUMENT)
    assert refused or OURS[dims](5, bias=False).bias is None
