"""The same bits from run to run and for any number of threads; every instruction set that this
machine has keeps the promise on numerics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bnorm_ext
from tests.common.cases import DTYPES, Case, accumulation_type, case, normal, run, threads

# Every way through the memory (rows of a channel, short rows across samples, samples joined into
# rows, rows that crowd one set of the cache), below and above the size from which threads are used
# (32768 values), with one chunk and several, tiles of all channels and of some.
SHAPES = {
    "many channels": ((3, 64, 15, 17), "contiguous"),
    "few channels": ((8, 3, 47, 49), "contiguous"),
    "one channel": ((5, 1, 101, 103), "contiguous"),
    "long rows": ((2, 2, 20011), "contiguous"),
    "channels_last": ((3, 67, 16, 17), "channels_last"),
    "channels_last, blocks": ((2, 300, 9, 8), "channels_last"),
    "channels_last_3d": ((2, 10, 9, 16, 17), "channels_last_3d"),
    "2-d, huge N": ((40009, 3), "contiguous"),
    "2-d, many channels": ((200, 257), "contiguous"),
    "small": ((4, 5, 3, 2), "contiguous"),
    "short rows": ((37, 61, 7, 7), "contiguous"),
    "short rows, uneven shares": ((16, 160, 7, 7), "contiguous"),
    "short rows, more channels than a block": ((5, 2500, 4, 4), "contiguous"),
    "short rows, several chunks": ((600, 7, 5, 5), "contiguous"),
    "channels_last, crowded": ((5, 512, 6, 7), "channels_last"),
    "channels_last, units of vectors": ((4, 96, 21, 23), "channels_last"),
    "channels_last, joined samples": ((9, 24, 29, 31), "channels_last"),
}
ISAS = ["baseline", "avx2", "avx512"]


def bits(c: Case) -> dict[str, bytes]:
    found = {}
    for name, t in run(bnorm_ext.batch_norm, c).items():
        found[name] = t.contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_for_any_number_of_threads(name, dtype, training):
    shape, layout = SHAPES[name]
    # A mean of 3 leaves no sum exact, so that another order of addition shows.
    c = case(normal(shape, 0, 3), dtype, layout=layout, training=training)
    with threads(1):
        first = bits(c)
    for count in (1, 2, 3, 7, 12):
        with threads(count):
            again = bits(c)
        for key, value in first.items():
            assert again[key] == value, (count, key)


@pytest.mark.parametrize("shape", [(8, 16, 181, 183), (70, 64, 29, 29), (900, 64, 7, 7)], ids=str)
def test_same_bits_by_cache_block_and_by_chunk(shape):
    """Large outputs: a thread takes whole channels where these divide well among the threads, by
    4 but not by 9."""
    c = case(normal(shape, 0, 3))
    assert c.x.nbytes > 10 << 20
    with threads(1):
        first = bits(c)
    for count in (4, 9):
        with threads(count):
            assert bits(c) == first, count


def test_another_order_of_addition_would_show():
    """The tests above can fail: the same values in other places move the bits of the sums."""
    shape, layout = SHAPES["few channels"]
    c = case(normal(shape, 0, 3), layout=layout)
    turned = c.but(x=c.x.roll((1, 5), (0, 3)), dy=c.dy.roll((1, 5), (0, 3)))
    assert bits(c)["dweight"] != bits(turned)["dweight"]
    assert bits(c)["dbias"] != bits(turned)["dbias"]


def test_operators_of_synchronised_training_are_independent_of_threads():
    ops = torch.ops.bnorm_ext
    for shape, layout in SHAPES.values():
        c = case(normal(shape, 0, 3), layout=layout)
        found = []
        for count in (1, 3):
            with threads(count):
                mean, var = ops.batch_norm_stats(c.x)
                m, r = mean.float(), (1 / (var + 1e-5).sqrt()).float()
                y, _ = ops.batch_norm_apply(c.x, None, None, None, m, r)
                sums = ops.batch_norm_backward_reduce(c.dy, c.x, None, None, None, m, r, None)
            found.append((mean, var, y, *sums))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


# ---- Large outputs ------------------------------------------------------------------------------

# Calls that touch 20 MiB and more use nontemporal stores, for whole aligned vectors only. In rows
# of odd lengths the partial vectors before and after them are at every offset. Joined rows have one
# loop for samples of whole vectors and one for others.
LARGE = {
    "rows of channels": (67,),
    "planes": (3, 4099),
    "wide": (1031, 1),
    "rows that run into each other": (64, 7, 7),
    "in samples that are not aligned": (67, 7, 7),
}


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tail", LARGE.values(), ids=LARGE.keys())
def test_large_outputs_have_the_bits_of_small_ones(tail, dtype, added):
    row = torch.Size(tail).numel() * dtype.itemsize
    rows = (12 << 20) // row + 3
    x = normal((101, *tail), 0, 3).to(dtype).repeat(-(-rows // 101), *[1] * len(tail))[:rows]
    dy, residual = x.flip(0), x.roll(1, 0)
    acc = accumulation_type(dtype)
    vectors = [normal((tail[0],), seed).abs().to(acc) + 0.5 for seed in range(6)]
    weight, bias, mean, rstd, mean_dy, mean_dy_xhat = vectors
    ops = torch.ops.bnorm_ext
    known, act = (weight, bias - 2, mean, rstd), "relu" if added else "identity"

    def forward_and_backward(x: Tensor, dy: Tensor, r: Tensor) -> list[Tensor]:
        also = r if added else None
        y, mask = ops.batch_norm_apply(x, also, *known, act, save_mask=added)
        saved = mask if added else None
        means = (mean_dy, mean_dy_xhat)
        dx, dr = ops.batch_norm_backward_apply(dy, x, also, *known, saved, *means, act)
        return [y, dx, dr] if added else [y, dx]

    assert 2 * x.nbytes > 20 << 20
    large = forward_and_backward(x, dy, residual)
    for part in torch.arange(rows).tensor_split(4):
        few = slice(int(part[0]), int(part[-1]) + 1)
        assert 4 * x[few].nbytes < 20 << 20
        small = forward_and_backward(x[few], dy[few], residual[few])
        for a, b in zip(large, small, strict=True):
            assert torch.equal(a[few], b)


# ---- Instruction sets ---------------------------------------------------------------------------

ISA_CHECK = """
import sys
import torch
import bnorm_ext
from tests.common.cases import DTYPES, FORMATS, assert_promise, case, normal
from tests.common import fused_cases
assert bnorm_ext.build_info()["cpu_capability"] == sys.argv[1]
torch.set_num_threads(1)
# Every tail after whole vectors (of 16 elements at most), in rows and in channels; a few chunks.
SHAPES = [(3, 5, n) for n in (*range(1, 18), 31, 63)] + [(7, n) for n in (*range(1, 18), 130)]
SHAPES += [(2, 131, 3, 3), (3, 2, 70, 61), (2, 259, 1, 1)]
for dtype in DTYPES:
    for seed, shape in enumerate(SHAPES):
        for layout in ["contiguous"] + ["channels_last"] * (len(shape) == 4):
            for training in (True, False):
                c = case(normal(shape, seed, 2), dtype, layout=layout, training=training)
                # Native happens to be exact for a handful of values: the bound alone.
                assert_promise(c, beside_native=False)

# The same tails through activation, residual and mask.
for dtype in DTYPES:
    for seed, shape in enumerate(SHAPES[::3]):
        for layout in ["contiguous"] + ["channels_last"] * (len(shape) == 4):
            for act in fused_cases.ACTS[1:]:
                for residual in (False, True):
                    f = fused_cases.make(shape, dtype, layout, act, residual, seed % 2 == 0, seed)
                    fused_cases.assert_close(f, beside_native=False)

# Every 16-bit pattern through load and store: with identity statistics y = fma(x - 0, 1, 0) = x.
# Var and eps add up to 1 exactly; an eps of 0 would take native's path.
EPS = 2.0**-10
patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    x = patterns.view(dtype)
    pixels = x[:65520].view(2, 7, 8, 585).to(memory_format=torch.channels_last)
    for view in (x.view(-1, 1), x.view(1, 1, -1), x.view(256, 256), x.view(2, 8, 4096),
                 x[1:].view(1, -1), x[:65535].view(-1, 5), pixels):
        C = view.shape[1]
        var = torch.full((C,), 1 - EPS)
        y = bnorm_ext.batch_norm(view, torch.zeros(C), var, torch.ones(C), None, eps=EPS)
        assert torch.equal(y.isnan(), view.isnan())
        keep = ~view.isnan()
        # Signed zeros apart (-0 + 0 is 0) the very bits come back.
        assert torch.equal(y[keep], view[keep])
        changed = y[keep].view(torch.int16) ^ view[keep].view(torch.int16)
        assert not (changed & 0x7fff).any()

    # Rounding of the store: sums that fall between two neighbours, ties among them, round as
    # torch's own conversion does. y = x + bias with x and bias exact in float32.
    for bias in (0.0, 2.0**-9, 2.0**-12, 3 * 2.0**-13, 1 / 3, 2.0**-24, -2.0**-25, 65519.0):
        wide = x.view(-1, 1).float()
        y = bnorm_ext.batch_norm(x.view(-1, 1), torch.zeros(1), torch.full((1,), 1 - EPS),
                                 torch.ones(1), torch.tensor([bias]), eps=EPS)
        right = (wide + torch.tensor([bias])).to(dtype)
        assert torch.equal(y.isnan(), right.isnan())
        assert torch.equal(y.nan_to_num(1.5, 7, -7), right.nan_to_num(1.5, 7, -7)), (dtype, bias)

"""


def in_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "BNORM_EXT_CPU_CAPABILITY": isa,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.run(
        [sys.executable, "-c", code, isa], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa):
    chosen = bnorm_ext.build_info()["cpu_capability"]
    assert chosen in ISAS
    if ISAS.index(isa) > ISAS.index(chosen):
        pytest.skip(f"this machine has no {isa}")
    done = in_process(ISA_CHECK, isa)
    assert done.returncode == 0, done.stderr[-3000:]


def test_unknown_instruction_set_is_named():
    code = (
        "import torch, bnorm_ext; bnorm_ext.batch_norm(torch.ones(2, 2), None, None, training=True)"
    )
    done = in_process(code, "sse9")
    assert done.returncode == 1
    assert "BNORM_EXT_CPU_CAPABILITY=sse9" in done.stderr
    assert "baseline" in done.stderr
