"""Memory formats and strides: outputs and gradients are laid out as native's, and values do not
depend on where in memory they came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bnorm_ext
from bnorm_ext import _compat, _load
from tests.common.cases import BOTH, DTYPES, Case, case, normal, run


def storage(*shape: int) -> Tensor:
    return normal(shape, 0, 1).float()


def offset(shape: tuple[int, ...], by: int) -> Tensor:
    """Dense, but starting ``by`` elements after an aligned address."""
    count = torch.Size(shape).numel()
    return storage(count + by)[by:].view(shape)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "2-d": lambda: storage(6, 5),
    "2-d transposed": lambda: storage(5, 6).t(),
    "2-d column slice": lambda: storage(6, 9)[:, 2:7],
    "2-d row steps": lambda: storage(12, 5)[::2],
    "2-d reversed columns": lambda: storage(6, 5).flip(1)[:, ::2],
    "2-d expanded rows": lambda: storage(1, 5).expand(6, 5),
    "2-d expanded columns": lambda: storage(6, 1).expand(6, 5),
    "2-d one channel": lambda: storage(6, 1),
    "2-d one channel of more": lambda: storage(6, 4)[:, 1:2],
    "3-d": lambda: storage(3, 5, 7),
    "3-d NLC": lambda: storage(3, 7, 5).transpose(1, 2),
    "3-d LNC": lambda: storage(7, 3, 5).permute(1, 2, 0),
    "3-d one position": lambda: storage(3, 5, 1),
    "3-d one sample": lambda: storage(1, 5, 7),
    "3-d expanded": lambda: storage(3, 5, 1).expand(3, 5, 7),
    "4-d": lambda: storage(3, 5, 4, 2),
    "4-d channels_last": lambda: storage(3, 5, 4, 2).contiguous(memory_format=torch.channels_last),
    "4-d CNHW": lambda: storage(5, 3, 4, 2).transpose(0, 1),
    "4-d WHCN": lambda: storage(2, 4, 5, 3).permute(3, 2, 1, 0),
    "4-d transposed plane": lambda: storage(3, 5, 2, 4).transpose(2, 3),
    "4-d crop": lambda: storage(3, 5, 6, 5)[:, :, 1:5, 2:4],
    "4-d channel slice": lambda: storage(3, 9, 4, 2)[:, 1:6],
    "4-d channel steps": lambda: storage(3, 10, 4, 2)[:, ::2],
    "4-d crop of channels_last": lambda: storage(3, 6, 5, 5).permute(0, 3, 1, 2)[:, :, 1:5, 2:4],
    "4-d channel slice of channels_last": lambda: storage(3, 4, 2, 9).permute(0, 3, 1, 2)[:, 1:6],
    "4-d row slice of channels_last": lambda: storage(6, 4, 2, 5).permute(0, 3, 1, 2)[1:4],
    "4-d one channel": lambda: storage(3, 1, 4, 2),
    "4-d one channel, channels_last": lambda: storage(3, 4, 2, 1).permute(0, 3, 1, 2),
    "4-d one channel of more": lambda: storage(3, 5, 4, 2)[:, 2:3],
    "4-d one pixel": lambda: storage(3, 5, 1, 1),
    "4-d one pixel, channels_last": lambda: storage(3, 1, 1, 5).permute(0, 3, 1, 2),
    "4-d one pixel of more": lambda: storage(3, 5, 4, 2)[:, :, 1:2, 1:2],
    "4-d one sample": lambda: storage(1, 5, 4, 2),
    "4-d one sample, channels_last": lambda: storage(1, 4, 2, 5).permute(0, 3, 1, 2),
    "4-d one row": lambda: storage(3, 5, 1, 8),
    "4-d one column, channels_last": lambda: storage(3, 8, 1, 5).permute(0, 3, 1, 2),
    "4-d expanded sample": lambda: storage(1, 5, 4, 2).expand(3, 5, 4, 2),
    "4-d expanded channel": lambda: storage(3, 1, 4, 2).expand(3, 5, 4, 2),
    "4-d expanded pixel": lambda: storage(3, 5, 1, 1).expand(3, 5, 4, 2),
    "4-d pooled view": lambda: storage(3, 5, 4).unsqueeze(-1),
    "5-d": lambda: storage(2, 5, 3, 2, 4),
    "5-d channels_last": lambda: storage(2, 3, 2, 4, 5).permute(0, 4, 1, 2, 3),
    "5-d crop of channels_last": lambda: storage(2, 3, 4, 4, 5).permute(0, 4, 1, 2, 3)[..., 1:3],
    "5-d one voxel": lambda: storage(4, 5, 1, 1, 1),
    "5-d frames first": lambda: storage(2, 3, 5, 2, 4).transpose(1, 2),
    "6-d": lambda: storage(2, 5, 2, 1, 3, 2),
    "6-d transposed": lambda: storage(2, 2, 1, 3, 2, 5).movedim(-1, 1),
    "negated view": lambda: torch.complex(storage(6, 5), storage(6, 5)).conj().imag,
    "overlapping windows": lambda: storage(40).as_strided((3, 5, 7), (5, 3, 1)),
    "channels_last, strange strides of size-1 dims": lambda: storage(60).as_strided(
        (3, 5, 1, 1), (5, 1, 7, 7)
    ),
    **{f"offset {by}": lambda by=by: offset((3, 5, 7), by) for by in (1, 2, 3, 5, 15)},
    **{
        f"offset {by}, channels_last": lambda by=by: offset((3, 4, 2, 5), by).permute(0, 3, 1, 2)
        for by in (1, 3, 7)
    },
}  # fmt: skip


def parameters(C: int) -> dict[str, Tensor]:
    c = case(normal((2, C), 5), seed=6)
    return {n: getattr(c, n) for n in ("running_mean", "running_var", "weight", "bias")}


def gradients_like(x: Tensor) -> dict[str, Tensor]:
    """dy of the shape of x in every layout that comes to mind."""
    shape = tuple(x.shape)
    dy = normal(shape, 9).float()
    found = {
        "contiguous": dy,
        "expanded": torch.ones(()).expand(shape),
        "columns first": dy.movedim(0, -1).contiguous().movedim(-1, 0),
        "channels last": dy.movedim(1, -1).contiguous().movedim(-1, 1),
        "steps": torch.stack([dy, dy], -1)[..., 0],
        "offset": torch.cat([dy.new_zeros(1), dy.flatten()])[1:].view(shape),
    }
    if x.dim() > 2:
        found["one value per channel"] = (
            dy.flatten(2)[..., :1].reshape(*shape[:2], *[1] * (x.dim() - 2)).expand(shape)
        )
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_strides_are_natives_and_values_those_of_the_contiguous_copy(make, training):
    x = make()
    for name, dy in gradients_like(x).items():
        c = Case(x, dy, **parameters(x.shape[1]), training=training)
        ours, native = (run(f, c) for f in BOTH.values())
        for key in ("y", "dx"):
            assert ours[key].stride() == native[key].stride(), (name, key)
            assert ours[key].is_contiguous() == native[key].is_contiguous()
        # The very same bits wherever the same layout is walked: any dy, and any x that native's
        # memory format makes the same dense tensor of.
        layout = torch.contiguous_format
        for wanted in (torch.channels_last, torch.channels_last_3d):
            if x.dim() == (4 if wanted == torch.channels_last else 5) and (
                ours["y"].is_contiguous(memory_format=wanted) and not ours["y"].is_contiguous()
            ):
                layout = wanted
        dense = c.but(
            x=x.clone(memory_format=layout), dy=dy.clone(memory_format=torch.contiguous_format)
        )
        for key, t in run(bnorm_ext.batch_norm, dense).items():
            assert torch.equal(ours[key], t), (name, key)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_permutation_step_and_offset(data):
    """Drawn: a shape, the order of its dimensions in memory, steps, a start. Both directions."""
    rank = data.draw(st.integers(2, 5))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    if shape[0] * torch.Size(shape[2:]).numel() == 1:
        shape[0] = 2

    def strided(seed: int) -> Tensor:
        order = data.draw(st.permutations(range(rank)))
        steps = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
        start = data.draw(st.integers(0, 3))
        sizes = [shape[d] * steps[d] for d in order]
        flat = normal((start + torch.Size(sizes).numel(),), seed).float()
        t = flat[start:].view(sizes).permute([order.index(d) for d in range(rank)])
        return t[tuple(slice(None, None, s) for s in steps)]

    x, dy = strided(1), strided(2)
    training = data.draw(st.booleans())
    c = Case(x, dy, **parameters(shape[1]), training=training)
    ours, native = (run(f, c) for f in BOTH.values())
    for key, t in native.items():
        assert ours[key].stride() == t.stride(), key
        # Same formula, at most 6^4 values: a few roundings of values up to about 30, and of dx,
        # which rstd of two nearly equal values multiplies by up to 300.
        torch.testing.assert_close(ours[key], t, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("length", [1, 7, 16, 33, 4097])
def test_every_alignment(dtype, length):
    """Rows that start anywhere relative to a vector."""
    reference: dict[str, Tensor] = {}
    for by in range(17):
        x = torch.cat([torch.zeros(by), normal((2 * 3 * length,), 1).float()]).to(dtype)[by:]
        c = case(normal((2, 3), 0), dtype, seed=2)
        c = c.but(x=x.view(2, 3, length), dy=x.view(2, 3, length) * 2 + 1)
        for key, t in run(bnorm_ext.batch_norm, c).items():
            assert torch.equal(t, reference.setdefault(key, t)), (by, key)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_parameters_and_buffers_that_are_views(dtype, training):
    """Read and updated through their strides; what lies between is untouched."""
    x = normal((4, 5, 3, 2), 0, 1).to(dtype)
    plain = {n: t.to(dtype) for n, t in parameters(5).items()}
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "steps": lambda t: torch.stack([t, torch.full_like(t, 99)], 1)[:, 0],
        "column": lambda t: torch.stack([torch.full_like(t, 99)] * 3 + [t], 1)[:, 3],
        "offset": lambda t: torch.cat([t.new_full((1,), 99), t])[1:],
    }
    right = run(bnorm_ext.batch_norm, Case(x, x, **plain, training=training))
    for name, view in views.items():
        strided = {n: view(t) for n, t in plain.items()}
        weight, bias = (strided[n].detach().requires_grad_() for n in ("weight", "bias"))
        leaf = x.clone().requires_grad_()
        y = bnorm_ext.batch_norm(
            leaf, strided["running_mean"], strided["running_var"], weight, bias, training
        )
        dx, dweight, dbias = torch.autograd.grad(y, (leaf, weight, bias), x)
        seen = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        seen |= {n: strided[n] for n in ("running_mean", "running_var")}
        for key, t in seen.items():
            assert torch.equal(t, right[key]), (name, key)
        for n in ("running_mean", "running_var"):
            base = strided[n]._base
            assert base is not None
            assert (base == 99).sum() == base.numel() - 5


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_parameters_of_shape_1_C(training):
    """Native takes them forward, and fails backward."""
    c = Case(storage(4, 5, 3), storage(4, 5, 3), **parameters(5), training=training)
    assert c.weight is not None
    assert c.bias is not None
    flat = run(bnorm_ext.batch_norm, c)
    wide = c.but(weight=c.weight[None], bias=c.bias[None])
    for key, t in run(bnorm_ext.batch_norm, wide).items():
        assert t.shape == ((1, 5) if key in ("dweight", "dbias") else flat[key].shape), key
        assert torch.equal(t.reshape(flat[key].shape), flat[key]), key
    y = F.batch_norm(wide.x, wide.running_mean, wide.running_var, wide.weight, wide.bias, training)
    assert y.shape == flat["y"].shape


def test_output_never_shares_memory_with_the_input():
    for make in INPUTS.values():
        x = make()
        before = x.clone()
        for training in (True, False):
            y = bnorm_ext.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, None,
                                     training)  # fmt: skip
            y.fill_(7)
            assert torch.equal(x, before)


def test_autocast_leaves_dtypes_as_native():
    x, weight = storage(4, 5, 3, 2), torch.ones(5)
    with torch.autocast("cpu", torch.bfloat16):
        for t in (x, x.bfloat16()):
            ours, native = (
                f(t, None, None, weight, training=True)
                for f in (bnorm_ext.batch_norm, F.batch_norm)
            )
            assert ours.dtype == native.dtype


FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


@pytest.mark.skipif(_load.DISABLED, reason="BNORM_EXT_DISABLE=1: there are no operators")
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_channels_last_is_told_as_the_kernels_tell_it(rank):
    sizes, strides = (1, 2, 3), (0, 1, 2, 3, 6, 12)
    buffer = torch.zeros(200)
    formats = set()
    for _ in range(1000):
        shape = [sizes[int(i)] for i in torch.randint(len(sizes), (rank,))]
        stride = [strides[int(i)] for i in torch.randint(len(strides), (rank,))]
        x = buffer.as_strided(shape, stride)
        if any(x.is_contiguous(memory_format=f) for f in FORMATS):  # the kernels do not ask then
            continue
        v = torch.ones(shape[1])
        y, _ = torch.ops.bnorm_ext.batch_norm_inference(x, None, v, v, v, v, 1e-5)
        formats.add(told := _compat.channels_last_or_contiguous(x))
        assert y.stride() == torch.empty(shape, memory_format=told).stride(), (shape, stride)
    assert len(formats) == (1 if rank < 4 else 2)
