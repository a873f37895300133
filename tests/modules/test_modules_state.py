"""Everything around the forward pass that the modules take over from torch's: checkpoints,
copies, hooks, conversion of dtype and device, the lazy forms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.common.twins import (
    FLOAT64,
    NATIVE,
    NATIVE_LAZY,
    NO_BIAS,
    OURS,
    OURS_LAZY,
    SHAPES,
    assert_same,
    outcome,
    step,
    twins,
)

DIMS = [1, 2, 3]


def batch(dims=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *SHAPES[dims], generator=generator, dtype=dtype)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"track_running_stats": False}, *NO_BIAS]
)
def test_state_dict_round_trip_both_ways(dims, kwargs):
    ours, native = twins(dims, **kwargs)
    x, dy = batch(dims)
    step(ours, x, dy)
    fresh = NATIVE[dims](5, dtype=torch.float64, **kwargs)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    again = OURS[dims](5, dtype=torch.float64, **kwargs)
    again.load_state_dict(fresh.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(native.state_dict())
    assert ours.state_dict()._metadata == native.state_dict()._metadata
    assert ours.state_dict()._metadata[""]["version"] == 2
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_checkpoint_file_round_trip():
    ours, _ = twins(2)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = OURS[2](5, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(dict(other.state_dict()), dict(ours.state_dict()))


def test_version_1_checkpoint_without_counter_loads():
    ours, native = twins(2)
    old = copy.copy(native.state_dict())
    del old["num_batches_tracked"]
    old._metadata = {"": {"version": 1}}
    assert ours.load_state_dict(copy.copy(old)) == native.load_state_dict(copy.copy(old))
    assert ours.num_batches_tracked.item() == 0
    fails = outcome(lambda: OURS[2](4).load_state_dict(old))
    assert fails is not None
    assert fails == outcome(lambda: NATIVE[2](4).load_state_dict(old))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("dims", DIMS)
def test_copies_are_equal_and_independent(dims, duplicate):
    ours, _ = twins(dims, momentum=None)
    ours.extra = {"mine": 1}
    x, dy = batch(dims)
    step(ours, x, dy)
    twin = duplicate(ours)
    assert type(twin) is type(ours)
    assert twin.extra == {"mine": 1}
    untouched = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    seen = step(twin, x, dy)
    assert_same(dict(ours.state_dict()), untouched)
    assert_same(seen, step(ours, x, dy))


def test_whole_module_saves_and_loads():
    ours, _ = twins(2)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, dy = batch()
    assert_same(step(loaded, x, dy), step(ours, x, dy))


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float"])
def test_dtype_changes_as_native(change):
    ours, native = twins(2)
    getattr(ours, change)(), getattr(native, change)()
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), native.state_dict().items(), strict=True
    ):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_meta_device():
    """Built without memory, materialised later, as large models are loaded."""
    ours = OURS[2](5, device="meta")
    assert all(tensor.is_meta for tensor in ours.state_dict().values())
    y = ours(torch.empty(SHAPES[2], device="meta"))
    assert y.is_meta
    assert y.shape == SHAPES[2]
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    x, dy = batch(dtype=torch.float32)
    seen = step(ours, x, dy)
    assert_same(seen, step(OURS[2](5), x, dy))


def test_device_and_dtype_arguments():
    ours = OURS[2](5, device="cpu", dtype=torch.bfloat16)
    assert {t.dtype for t in ours.state_dict().values()} == {torch.bfloat16, torch.int64}
    with torch.device("meta"):
        assert OURS[2](5).weight.is_meta


def test_hooks_run_once_each_with_natives_arguments():
    x, dy = batch()
    logs = []
    for module in twins(2):
        log: list[str] = []
        module.register_forward_pre_hook(lambda m, a, log=log: log.append(f"pre {len(a)}"))
        module.register_forward_pre_hook(
            lambda m, a, k, log=log: log.append(f"pre-kw {len(a)} {sorted(k)}"), with_kwargs=True
        )
        module.register_forward_hook(
            lambda m, a, y, log=log: log.append(f"forward {tuple(y.shape)}")
        )
        module.register_full_backward_pre_hook(
            lambda m, g, log=log: log.append(f"backward-pre {len(g)}")
        )
        module.register_full_backward_hook(
            lambda m, gi, go, log=log: log.append(f"backward {len(gi)} {len(go)}")
        )
        module.register_state_dict_post_hook(lambda m, s, p, c, log=log: log.append("state"))
        module.register_load_state_dict_pre_hook(lambda m, *a, log=log: log.append("load-pre"))
        module.register_load_state_dict_post_hook(lambda m, k, log=log: log.append("load-post"))
        inputs = x.clone().requires_grad_()
        module(inputs).backward(dy)
        module.load_state_dict(module.state_dict())
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8


def test_hooks_see_the_arguments_as_they_were_given():
    x, _ = batch()
    for module in twins(2):
        seen = []
        module.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append((len(a), list(k))), with_kwargs=True
        )
        module(x), module(input=x)
        assert seen == [(1, []), (0, ["input"])]


def test_hooks_that_change_input_output_and_gradient():
    ours, native = twins(2)
    for module in (ours, native):
        module.register_forward_pre_hook(lambda m, a: (a[0] * 3,))
        module.register_forward_hook(lambda m, a, y: y + 1)
        module.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    x, dy = batch()
    assert_same(step(ours, x, dy), step(native, x, dy))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_lazy_becomes_ours_and_computes_as_native(dims, kwargs):
    ours = OURS_LAZY[dims](dtype=torch.float64, **kwargs)
    native = NATIVE_LAZY[dims](dtype=torch.float64, **kwargs)
    assert isinstance(ours, NATIVE_LAZY[dims])
    assert repr(ours) == repr(native)
    assert ours.has_uninitialized_params() == native.has_uninitialized_params()
    x, dy = batch(dims)
    for _ in range(2):
        assert_same(step(ours, x, dy), step(native, x, dy))
    assert type(ours) is OURS[dims]
    assert ours.num_features == 5
    assert repr(ours) == repr(native)


def test_lazy_loads_an_initialised_checkpoint():
    trained, _ = twins(2)
    lazy = OURS_LAZY[2](dtype=torch.float64)
    lazy.load_state_dict(trained.state_dict(), strict=True)
    lazy.eval(), trained.eval()
    x, _ = batch()
    torch.testing.assert_close(lazy(x), trained(x), **FLOAT64)
    assert type(lazy) is OURS[2]


def test_lazy_refuses_a_wrong_rank_as_native():
    x = torch.randn(4, 5)
    expected = outcome(lambda: nn.LazyBatchNorm2d()(x))
    assert expected is not None
    assert outcome(lambda: OURS_LAZY[2]()(x)) == expected
