"""The CUDA kernels, run by the emulator: results, and nothing to report."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnorm_ext
from bnorm_ext.reference import batch_norm_reference
from tests.common import emulated
from tests.common.cases import DTYPES, assert_exact, assert_promise, case, kinds, normal, run
from tests.common.emulated_cases import LAYOUTS, SHAPES_AND_LAYOUTS, made, same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), SHAPES_AND_LAYOUTS)
def test_results(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Training and inference, forward and backward, against float64 within the promise; the same
    bits for every order of threads and blocks."""
    for training in (True, False):
        c = made(shape, dtype, layout, training=training)
        first = emulated.run(c, seed=0)
        assert_promise(c, ours=first)
        for seed in (1, 2):
            assert same_bits(emulated.run(c, seed=seed), first), f"seed {seed}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_start_that_is_not_a_multiple_of_16_bytes(dtype: torch.dtype, layout: str) -> None:
    for shape in ((4, 8, 4, 8), (4, 8, 7, 7)):
        c = made(shape, dtype, layout)
        storage = torch.empty(c.x.numel() + 1, dtype=dtype)
        shifted = storage.as_strided(c.x.shape, c.x.stride(), 1)
        assert shifted.data_ptr() % 16 != 0
        # One of them alone is not aligned: the vector path must look at all of them.
        for moved in (c.but(x=shifted.copy_(c.x)), c.but(dy=shifted.copy_(c.dy))):
            assert_promise(moved, ours=emulated.run(moved))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_rows_than_a_grid_dimension(layout: str) -> None:
    c = made((70000, 2, 1, 2), torch.float32, layout)
    assert_promise(c, ours=emulated.run(c))


@pytest.mark.parametrize(
    ("layout", "shape", "chunks"),
    [("contiguous", (1, 2, 263, 263), 34), ("channels_last", (3, 37, 27, 27), 35)],
)
def test_many_chunks_are_merged_in_two_steps(
    layout: str, shape: tuple[int, ...], chunks: int
) -> None:
    """More blocks for each of two tiles than one block adds up, and no multiple of 16 of them."""
    c = made(shape, torch.float32, layout)
    launches: list[str] = []
    first = emulated.run(c, launches=launches.append, multiprocessors=35)
    reducing = [line for line in launches if "statistics" in line or "backward_reduce" in line]
    assert [int(line.rsplit(" ", 4)[1]) for line in reducing] == [2 * chunks] * 2
    assert_promise(c, ours=first)
    assert same_bits(emulated.run(c, seed=1, multiprocessors=35), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_16_bit_parameters(dtype: torch.dtype, training: bool) -> None:
    c = made((4, 6, 4, 8), dtype, "contiguous", parameters=dtype, training=training)
    assert_promise(c, ours=emulated.run(c))


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("running", [True, False])
def test_absent_arguments(absent: tuple[str, ...], running: bool) -> None:
    changes = dict.fromkeys(absent)
    if not running:
        changes |= dict.fromkeys(("running_mean", "running_var"))
    c = made((4, 6, 4, 8), torch.float32, "contiguous", **changes)
    assert_promise(c, ours=emulated.run(c))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_mean_far_from_zero(layout: str, mean: float) -> None:
    c = case(normal((4, 3, 16, 24), seed=3, mean=mean), torch.float32, layout=layout)
    assert_promise(c, ours=emulated.run(c), beside_native=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_cancels(layout: str) -> None:
    """A mean that is a float costs y nothing, however large: x - mean is taken first."""
    sign = torch.where(normal((4, 3, 16, 24), seed=5) > 0, 1.0, -1.0).flatten(2)
    sign[..., ::2] = -sign[..., 1::2]
    c = case(1e5 + sign.view(4, 3, 16, 24).double(), torch.float32, layout=layout)
    assert_exact(c, emulated.run(c)["y"])


@pytest.mark.parametrize("path", ["two_pass", "block"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_is_known_beyond_float(layout: str, path: str) -> None:
    """What rounding it leaves out would be 1e4 times as large in y."""
    c = case(normal((4, 3, 16, 24), seed=6, mean=1e4), torch.float32, layout=layout)
    assert_exact(c, emulated.run(c, path=path)["y"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_between_two_floats(layout: str) -> None:
    """The mean of every batch of values rounds the same way: what that loses has to be mended."""
    x = torch.full((4, 3, 16, 24), 1e5)
    x[..., ::2] = torch.nextafter(torch.tensor(1e5), torch.tensor(torch.inf))
    x = x.contiguous(memory_format=getattr(torch, layout, torch.contiguous_format))
    with emulated.session() as s:
        mean, var = (t.clone() for t in s.call("batch_norm_stats", s.copy(x)))
    std = x.double().std(unbiased=False)
    assert ((mean - x.double().mean()).abs() < 1e-6 * std).all()
    torch.testing.assert_close(var.sqrt(), std.expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("path", "blocks", "batches"), [("two_pass", 2, 128), ("block", 1, 32)])
def test_first_values_far_from_the_rest(path: str, blocks: int, batches: int) -> None:
    """The first batch of every thread is far from its other ones: only in the run that it begins do
    squares of deviations from it lose bits."""
    first = blocks * 128 * 4  # rows
    x = torch.zeros(first * batches, 2)
    x[:first] = 1.7
    with emulated.session(path=path, multiprocessors=1) as s:
        _, _, rstd, _ = s.call(
            *("batch_norm_training", s.copy(x), None, None, None, None, None, None, 0.1, 1e-5),
            *("identity", 0.0, False),
        )
        found = rstd.double()
    assert int(s.launches[0].rsplit(" ", 4)[1]) == blocks
    right = (x.double().var(0, unbiased=False) + 1e-5).rsqrt()
    # 16 batches of a run: 16 additions of squares, of which a sixteenth remains; half for the root.
    assert ((found / right - 1).abs() < 16 * 16 / 2 * 2**-24).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", [0, 1, -1])
def test_outlier(layout: str, where: int) -> None:
    """The first value of a channel is what the kernels take deviations from."""
    x = normal((4, 3, 16, 24), seed=3)
    x[where, :, where, where] = 1e4
    c = case(x, torch.float32, layout=layout)
    assert_promise(c, ours=emulated.run(c), beside_native=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_valued_data(layout: str) -> None:
    x = torch.where(normal((8, 3, 16, 24), seed=5) > 1, 1.3, 0.7).double()
    c = case(x, torch.float32, layout=layout, dy=torch.where(x > 1, 0.1, 0.3).double())
    assert_promise(c, ours=emulated.run(c), beside_native=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e25])
@pytest.mark.parametrize("where", [0, 37])
def test_values_beyond_float(layout: str, value: float, where: int) -> None:
    """Infinities, NaN and sums that exceed float's range: kind for kind what the CPU gives."""
    x = normal((4, 3, 8, 8), seed=3)
    x[:, 1].view(4, 64)[:, where] = value
    c = case(x, torch.float32, layout=layout)
    ours, cpu = emulated.run(c), run(bnorm_ext.batch_norm, c)
    for name in cpu:
        assert kinds(ours[name]) == kinds(cpu[name]), name


def test_float16_products_beyond_its_range() -> None:
    """Native rounds dy * (x - mean) to 16 bit on CUDA, where this overflows."""
    c = made((4, 4, 8, 8), torch.float16, "contiguous")
    c = c.but(x=c.x * 100, dy=c.dy * 1000)
    assert (c.x.float() * c.dy.float()).abs().max() > 65504
    assert_promise(c, ours=emulated.run(c))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counter(momentum: float | None, layout: str) -> None:
    c = made((4, 9, 4, 8), torch.float32, layout)
    count = torch.tensor(6)
    with emulated.session() as s:
        running = [s.copy(c.running_mean, inout=True), s.copy(c.running_var, inout=True)]
        counter = s.copy(count, inout=True)
        s.call(
            *("batch_norm_training", s.copy(c.x), None, None, None, *running, counter, momentum),
            *(c.eps, "identity", 0.01),
        )
        found = [t.clone() for t in (*running, counter)]
    m = 1 / 7 if momentum is None else momentum
    right = batch_norm_reference(c.x, c.running_mean, c.running_var, None, None, True, m, c.eps)
    torch.testing.assert_close(found[0].double(), right.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1].double(), right.running_var, rtol=1e-6, atol=0)
    assert found[2].item() == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_are_asked_for(layout: str) -> None:
    """Each combination of dx, dweight, dbias: the same bits as all three, the others undefined."""
    c = made((8, 2, 32, 48), torch.float32, layout)
    whole = emulated.run(c)
    for mask in itertools.product([True, False], repeat=3):
        with emulated.session() as s:
            x, dy = s.copy(c.x), s.copy(c.dy)
            weight, bias = s.copy(c.weight), s.copy(c.bias)
            _, mean, rstd, _ = s.call(
                *("batch_norm_training", x, None, weight, bias, None, None, None, 0.1, c.eps),
                *("identity", 0.01),
            )
            dx, _, dweight, dbias = s.call(
                *("batch_norm_backward", dy, x, None, weight, bias, None, None, mean, rstd, True),
                *(c.eps, None, "identity", 0.01, [mask[0], False, mask[1], mask[2]]),
            )
            found = [t if t is None else t.clone() for t in (dx, dweight, dbias)]
        for name, wanted, t in zip(("dx", "dweight", "dbias"), mask, found, strict=True):
            assert (t is not None) == wanted
            assert t is None or torch.equal(t, whole[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pieces_of_synchronised_training(dtype: torch.dtype, layout: str) -> None:
    """Statistics of two halves merged, applied, and the same backward: as one batch."""
    c = made((8, 5, 6, 8), dtype, layout)
    halves = [(c.x[:3], c.dy[:3]), (c.x[3:], c.dy[3:])]
    act = ("identity", 0.01)
    with emulated.session() as s:
        weight, bias = s.copy(c.weight), s.copy(c.bias)
        running = [s.copy(c.running_mean, inout=True), s.copy(c.running_var, inout=True)]
        counter = s.copy(torch.tensor(0), inout=True)
        parts = [(s.copy(x), s.copy(dy)) for x, dy in halves]
        found = [s.call("batch_norm_stats", x) for x, _ in parts]
        # A third process, without a batch.
        nothing = torch.full((5,), torch.nan, dtype=torch.float64)
        counts = torch.tensor([0, *(x[:, 0].numel() for x, _ in parts)], dtype=torch.float64)
        means, variances = (torch.stack([nothing, *ts]) for ts in zip(*found, strict=True))
        mean, rstd = s.call(
            *("batch_norm_merge_stats", means, variances, counts, *running, counter, c.momentum),
            *(c.eps, dtype),
        )
        ys = [s.call("batch_norm_apply", x, None, weight, bias, mean, rstd, *act) for x, _ in parts]
        sums = [
            s.call("batch_norm_backward_reduce", dy, x, None, weight, bias, mean, rstd, None, *act)
            for x, dy in parts
        ]
        sum_dy, sum_dy_xhat = (a + b for a, b in zip(*sums, strict=True))
        means = [sum_dy / counts.sum().item(), sum_dy_xhat / counts.sum().item()]
        dxs = [
            s.call(
                *("batch_norm_backward_apply", dy, x, None, weight, bias, mean, rstd, None),
                *(*means, *act),
            )
            for x, dy in parts
        ]
        results = {
            "y": torch.cat([y for y, _ in ys]).clone(),
            "dx": torch.cat([dx for dx, _ in dxs]).clone(),
            "dweight": sum_dy_xhat.to(c.weight.dtype).clone(),
            "dbias": sum_dy.to(c.bias.dtype).clone(),
            "running_mean": running[0].clone(),
            "running_var": running[1].clone(),
        }
        assert counter.item() == 1
    assert_promise(c, ours=results)


def test_merged_counter() -> None:
    """The cumulative average reads the counter before it is incremented."""
    with emulated.session() as s:
        mean, var = torch.full((1, 4), 3.0).double(), torch.ones(1, 4).double()
        running = [s.copy(torch.zeros(4), inout=True), s.copy(torch.ones(4), inout=True)]
        counter = s.copy(torch.tensor(2), inout=True)
        count = torch.tensor([8.0]).double()
        s.call(
            *("batch_norm_merge_stats", mean, var, count, *running, counter, None, 1e-5),
            torch.float32,
        )
        found = running[0].clone(), counter.item()
    torch.testing.assert_close(found[0], torch.ones(4))
    assert found[1] == 3


def test_launches_of_one_stream_share_their_semaphores() -> None:
    """Many blocks per tile, three calls in one session: each leaves the semaphores at zero."""
    c = made((8, 2, 32, 48), torch.float32, "contiguous")
    with emulated.session(capturing=False) as s:
        found = [s.call("batch_norm_stats", s.copy(c.x)) for _ in range(3)]
        means = [mean.clone() for mean, _ in found]
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_launches_in_a_graph_have_semaphores_of_their_own() -> None:
    # In float64, where no output has as many bytes as the two semaphores.
    c = made((8, 2, 32, 48), torch.float64, "contiguous")
    assert same_bits(emulated.run(c, capturing=True), emulated.run(c))


@pytest.mark.slow
def test_sanitizers() -> None:
    """Address and undefined-behaviour sanitizers have nothing to say of kernels and host code."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-m", "not slow", "-k", "odd or blocks or counter or synchronised or beyond"]
    done = subprocess.run(
        command,
        env=emulated.sanitized_environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stdout + done.stderr
