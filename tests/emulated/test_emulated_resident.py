"""The CUDA kernels that do everything in one launch, run by the emulator on each of their paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import emulated
from tests.common.cases import Case, assert_promise, case, normal
from tests.common.emulated_cases import SLOPE, assert_right, fused, made, same_bits, without_kinks

PATHS: dict[str, dict[str, Any]] = {
    "block": {"path": "block"},
    "cluster": {"path": "cluster", "device": "sm_90", "multiprocessors": 4},
    "grid": {"path": "grid", "multiprocessors": 3},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    pytest.param((4, 6, 4, 8), "contiguous", id="vectors"),
    pytest.param((8, 2, 32, 48), "contiguous", id="few channels"),
    pytest.param((6, 1, 24, 40), "contiguous", id="one channel"),
    pytest.param((3, 37, 1, 8), "contiguous", id="a vector a row"),
    pytest.param((2, 3, 1, 4096), "contiguous", id="rows longer than a block"),
    pytest.param((9, 16, 7, 7), "contiguous", id="groups of channels"),
    # Where channel C would begin, the tensor has ended.
    pytest.param((1, 16, 7, 7), "contiguous", id="groups, one sample"),
    pytest.param((5, 32, 3, 3), "contiguous", id="channels of two vectors"),
    pytest.param((5, 3, 37, 29), "contiguous", id="odd rows"),
    pytest.param((3, 5, 7, 3), "contiguous", id="odd, small"),
    pytest.param((4, 16, 4, 8), "channels_last", id="vectors of channels"),
    pytest.param((4, 37, 13, 11), "channels_last", id="odd, last"),
    pytest.param((2, 304, 2, 2), "channels_last", id="many channels"),
    pytest.param((9, 8, 13, 11), "channels_last", id="few channels, last"),
    pytest.param((2, 16, 3, 4, 6), "channels_last", id="3-D"),
    pytest.param((130, 40), "channels_last", id="1-D"),
    pytest.param((130, 10), "channels_last", id="1-D, odd"),
]


def launched(line: str) -> tuple[str, int, int]:
    """Kernel, blocks, and blocks of a cluster of one of `emulated.Session.launches`."""
    kernel, blocks, _, _, cluster = line.rsplit(" ", 4)
    return kernel, int(blocks), int(cluster)


def paths(layout: str) -> list[str]:
    """In channels_last nothing is kept on chip, and there are no clusters."""
    return [path for path in PATHS if layout != "channels_last" or path != "cluster"]


def is_last(x: torch.Tensor) -> bool:
    """Whether a row of all channels is contiguous."""
    return x.dim() == 2 or not x.is_contiguous()


def one_launch(c: Case, *epilogue: emulated.Epilogue, **where: Any) -> dict[str, torch.Tensor]:
    """`emulated.run`, in one launch forward (but in inference) and one backward."""
    launches: list[str] = []
    results = emulated.run(c, *epilogue, launches=launches.append, **where)
    names = [launched(line)[0] for line in launches]
    kind = "sweep" if is_last(c.x) else "resident"
    forward = f"{kind}_forward_kernel" if c.training else "normalise_kernel"
    assert len(names) == 2, names
    assert forward in names[0]
    assert f"{kind}_backward_kernel" in names[1]
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("path", "shape", "layout"),
    [
        pytest.param(path, *each.values, id=f"{path}-{each.id}")
        for each in CASES
        for path in paths(str(each.values[1]))
    ],
)
def test_results(path: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Against float64 within the promise; the same bits for every order of threads and blocks."""
    for training in (True, False):
        c = made(shape, dtype, layout, training=training)
        first = one_launch(c, seed=0, **PATHS[path])
        assert_promise(c, ours=first)
        assert same_bits(one_launch(c, seed=1, **PATHS[path]), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["cluster", "grid"])
def test_groups_in_pieces(path: str, dtype: torch.dtype) -> None:
    """Rows of a group that are longer than a block is wide are a team's; some of its blocks have
    nothing of some channels."""
    for shape in ((3, 8, 17, 17), (2, 8, 1, 521)):
        c = made(shape, dtype, "contiguous")
        first = one_launch(c, seed=0, **PATHS[path])
        assert_promise(c, ours=first)
        assert same_bits(one_launch(c, seed=1, **PATHS[path]), first)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("block", (8, 2, 32, 48), [(2, 1), (2, 1)]),
        # Few channels, so that teams are as large as the device can feed, ...
        ("cluster", (24, 2, 32, 48), [(8, 4), (8, 4)]),
        # ... or as they must be: backward keeps two tensors.
        ("grid", (24, 2, 32, 48), [(6, 1), (6, 1)]),
    ],
)
def test_teams(path: str, shape: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    """Blocks, and blocks of a cluster."""
    launches: list[str] = []
    c = made(shape, torch.float32, "contiguous")
    emulated.run(c, launches=launches.append, **PATHS[path])
    assert [launched(line)[1:] for line in launches] == expected


def test_teams_take_tiles_one_after_the_other() -> None:
    """More channels than a cooperative grid has teams: memory and barriers are used again."""
    where = {"path": "grid", "device": "sm_75", "multiprocessors": 2}  # little shared memory
    for shape, blocks in (
        ((12, 5, 32, 32), [6, 6]),  # two teams of three blocks of a multiprocessor, one of six
        ((48, 20, 9, 7), [6, 2]),
        ((48, 9, 9, 7), [5, 6]),  # one value at a time: not copied asynchronously
    ):
        c = made(shape, torch.float32, "contiguous")
        launches: list[str] = []
        results = emulated.run(c, launches=launches.append, **where)
        assert [launched(line)[1] for line in launches] == blocks
        assert all("resident" in line for line in launches)
        assert_promise(c, ours=results)
        for seed in (1, 2):
            assert same_bits(emulated.run(c, seed=seed, **where), results)


def test_clusters_take_tiles_one_after_the_other() -> None:
    """The same of clusters, which read sums in each other's shared memory."""
    where = {"path": "cluster", "device": "sm_90", "multiprocessors": 1}
    for shape, expected in (
        ((12, 5, 32, 32), [(6, 2), (4, 2)]),  # three clusters, two
        ((48, 20, 9, 7), [(6, 2), (2, 2)]),
    ):
        c = made(shape, torch.float32, "contiguous")
        launches: list[str] = []
        results = emulated.run(c, launches=launches.append, **where)
        assert [launched(line)[1:] for line in launches] == expected
        assert_promise(c, ours=results)
        for seed in (1, 2):
            assert same_bits(emulated.run(c, seed=seed, **where), results)


@pytest.mark.parametrize(
    ("path", "layout"),
    [(path, at) for at in ("contiguous", "channels_last", "groups") for path in paths(at)],
)
def test_hard_data(path: str, layout: str) -> None:
    where = PATHS[path]
    shape = {"contiguous": (8, 4, 16, 16), "channels_last": (8, 16, 8, 8), "groups": (8, 8, 9, 7)}[
        layout
    ]
    layout = "contiguous" if layout == "groups" else layout
    far = normal(shape, seed=1, mean=1e5)
    outlier = normal(shape, seed=2)
    outlier.view(-1)[5] = 1e6
    two_valued = (normal(shape, seed=3) > 0).double() * 3 + 1000
    for x in (far, outlier, two_valued, torch.full(shape, 7.0)):
        c = case(x, torch.float32, layout=layout)
        assert_promise(c, ours=one_launch(c, **where))
    beyond = case(normal(shape, seed=4) * 1e19, torch.float32, layout=layout)
    assert_promise(beyond, ours=one_launch(beyond, **where))
    products = beyond.but(dy=beyond.dy * 1e25)
    assert_promise(products, ours=one_launch(products, **where))
    sums = case(normal(shape, seed=5).sign() * 3e38, torch.float32, layout=layout)
    assert one_launch(sums, **where)["y"].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", PATHS)
def test_values_that_are_not_finite(path: str, value: float) -> None:
    """What one channel has of them stays in it, and is what two passes make of it."""
    for layout, shape in (
        ("contiguous", (4, 6, 8, 8)),
        ("channels_last", (4, 16, 8, 8)),
        ("contiguous", (4, 8, 9, 7)),
    ):
        if path not in paths(layout):
            continue
        x = normal(shape, seed=1)
        x[1, 2, 0, 0] = value  # of the channels that share a vector, only one
        c = case(x, torch.float32, layout=layout)
        found, expected = one_launch(c, **PATHS[path]), emulated.run(c)
        for name, t in expected.items():
            assert torch.equal(found[name].isnan(), t.isnan()), name
            assert torch.equal(found[name].isinf(), t.isinf()), name


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_activation_and_residual(path: str, add: bool, act: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layout, shape in (
            ("contiguous", (4, 6, 4, 8)),
            ("channels_last", (4, 304, 2, 2)),
            ("contiguous", (4, 16, 5, 3)),
        ):
            for training in (True, False) if path in paths(layout) else ():
                c, e = fused(shape, dtype, layout, act, add, training=training)
                c = without_kinks(c, e)
                found = one_launch(c, e, **PATHS[path])
                assert_right(c, e, found)
                if "mask" in found:
                    two_pass = emulated.run(c, e)
                    kept = (found["mask"] == two_pass["mask"]).float().mean()
                    assert kept > 0.99  # z may differ in its last bit
                    recomputed = emulated.run(
                        c, emulated.Epilogue(act, SLOPE, e.residual, masked=False), **PATHS[path]
                    )
                    assert torch.equal(found["dx"], recomputed["dx"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("path", [*PATHS, "two_pass"])
def test_both_directions_see_the_same_side_of_a_kink(path: str, layout: str) -> None:
    """Far from 0, where a mean that is known better moves many z across it."""
    x = normal((8, 8, 32, 48), seed=6, mean=1e4)
    c = case(x, torch.float32, layout=layout)
    c = c.but(dy=torch.ones_like(c.x))
    found = emulated.run(c, emulated.Epilogue("relu"), **PATHS.get(path, {"path": path}))
    assert torch.equal(found["dbias"], (found["y"] > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("path", PATHS)
def test_counter(path: str, momentum: float | None) -> None:
    """Every tile reads the counter before the one launch increments it, once."""
    for layout, shape in (
        ("contiguous", (4, 6, 4, 8)),
        ("channels_last", (8, 144, 3, 3)),
        ("contiguous", (4, 24, 7, 5)),
    ):
        if path not in paths(layout):
            continue
        c = made(shape, torch.float32, layout)
        with emulated.session(**PATHS[path]) as s:
            x, weight, bias = (s.copy(t) for t in (c.x, c.weight, c.bias))
            mean, var = (s.copy(torch.zeros(shape[1]), inout=True) for _ in range(2))
            counter = s.copy(torch.tensor(3), inout=True)
            for _ in range(2):
                s.call("batch_norm_training", x, None, weight, bias, mean, var, counter, momentum,
                       c.eps, "identity", 0.0, False)  # fmt: skip
            assert counter.item() == 5
            true = c.x.double().mean([0, *range(2, c.x.dim())])
            share = 1 - 0.9**2 if momentum else 1 / 5 + 4 / 5 * 1 / 4
            torch.testing.assert_close(mean.double(), true * share, rtol=1e-5, atol=1e-6)
        assert len(s.launches) == 2


@pytest.mark.parametrize("shape", [(8, 2, 32, 48), (8, 8, 17, 17)], ids=["channels", "groups"])
@pytest.mark.parametrize("path", ["cluster", "grid"])
def test_refused_launch_takes_two_passes(path: str, shape: tuple[int, ...]) -> None:
    """The device holds less than the plan counted on: nothing is lost but time."""
    c = made(shape, torch.float32, "contiguous")
    with emulated.session(**PATHS[path]) as s:
        x, weight, bias = (s.copy(t) for t in (c.x, c.weight, c.bias))
        counter = s.copy(torch.tensor(3), inout=True)
        mean, var = (s.copy(torch.zeros(shape[1]), inout=True) for _ in range(2))
        s.refuse()
        y, m, rstd, _ = s.call("batch_norm_training", x, None, weight, bias, mean, var, counter,
                               None, c.eps, "identity", 0.0, False)  # fmt: skip
        s.refuse()
        dx = s.call("batch_norm_backward", s.copy(c.dy), x, None, weight, bias, None, None, m, rstd,
                    True, c.eps, None, "identity", 0.0, [True, False, True, True])[0]  # fmt: skip
        found = {"y": y.clone(), "dx": dx.clone()}
        assert counter.item() == 4
    expected = emulated.run(c)
    for name, t in found.items():
        assert torch.equal(t, expected[name])
    names = [line.split("::")[2].split("<")[0] for line in s.launches]
    assert names == [
        "resident_forward_kernel", "statistics_kernel", "normalise_kernel",
        "resident_backward_kernel", "backward_reduce_kernel", "backward_apply_kernel",
    ]  # fmt: skip


def test_calls_of_one_stream_share_their_barriers() -> None:
    """Under capture each has its own."""
    c = made((24, 2, 32, 48), torch.float32, "contiguous")
    found = []
    for capturing in (False, True):
        with emulated.session(capturing=capturing, **PATHS["grid"]) as s:
            x = s.copy(c.x)
            for _ in range(3):
                y, *_ = s.call("batch_norm_training", x, None, None, None, None, None, None, 0.1,
                               c.eps, "identity", 0.0, False)  # fmt: skip
                found.append(y.clone())
        assert len(s.launches) == 3
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(
    ("device", "multiprocessors", "blocks", "cluster"),
    [("sm_75", 2, 2, 1), ("sm_80", 2, 2, 1), ("sm_90", 2, 2, 1), ("sm_90", 4, 6, 3)],
)
def test_the_best_path(device: str, multiprocessors: int, blocks: int, cluster: int) -> None:
    """Not asked for any: one launch each, by clusters where blocks alone leave much idle."""
    launches: list[str] = []
    c = made((12, 2, 32, 32), torch.bfloat16, "contiguous")
    c = c if device != "sm_90" else made((24, 2, 32, 48), torch.bfloat16, "contiguous")
    results = emulated.run(c, launches=launches.append, device=device, path=None,
                           multiprocessors=multiprocessors)  # fmt: skip
    assert_promise(c, ours=results)
    assert all("resident" in line for line in launches)
    assert [launched(line)[1:] for line in launches] == [(blocks, cluster)] * 2


def test_unknown_path() -> None:
    c = made((4, 6, 4, 8), torch.float32, "contiguous")
    with pytest.raises(ValueError, match="must be two_pass, block, cluster or grid"):
        emulated.run(c, path="fast")
