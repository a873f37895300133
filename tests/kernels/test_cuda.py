"""What only a GPU can show: results there beside native, streams, graphs, size, no waiting.

The kernels themselves are tested everywhere, by the emulator (test_emulated_kernels.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from tests.common.cases import DTYPES, Case, assert_promise, case, normal, run
from tests.common.emulated import Epilogue, path_wanted
from tests.common.emulated_cases import (
    FUSED,
    LAYOUTS,
    PIECEWISE,
    SHAPES_AND_LAYOUTS,
    assert_right,
    fused,
    made,
    native,
    same_bits,
    without_kinks,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not bnorm_ext.build_info()["cuda_kernels"],
        reason="bnorm_ext was compiled without CUDA kernels",
    ),
]


def on(device: str, c: Case) -> Case:
    """The case with its tensors on a device, strides kept."""
    return c.but(**{n: t.to(device) for n, t in vars(c).items() if isinstance(t, torch.Tensor)})


def cpu(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in results.items()}


def check(c: Case, device: str = "cuda", **kwargs: bool) -> None:
    """Ours and native's on the device, against float64."""
    there = on(device, c)
    ours, native = (cpu(run(f, there)) for f in (bnorm_ext.batch_norm, F.batch_norm))
    assert_promise(c, ours=ours, native=native, **kwargs)


@pytest.fixture(params=["two_pass", "block", "cluster", "grid"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels take this path where the device and the tensor let them."""
    with path_wanted(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *SHAPES_AND_LAYOUTS,
        *(
            pytest.param(shape, layout, id=f"{shape}-{layout}")
            for shape in (
                (32, 64, 56, 56),
                (8, 256, 14, 14),
                (64, 512, 7, 7),
                (1, 1, 1024, 1024),
                (16, 3, 224, 224),
            )
            for layout in LAYOUTS
        ),
        pytest.param((4096, 256), "contiguous", id="4096x256"),
    ],
)
def test_results(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    for training in (True, False):
        check(made(shape, dtype, layout, training=training))


def run_fused(c: Case, e: Epilogue) -> dict[str, torch.Tensor]:
    leaves = {"x": c.x, "residual": e.residual, "weight": c.weight, "bias": c.bias}
    given = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    running = [t.clone() for t in (c.running_mean, c.running_var)]
    y = bnorm_ext.batch_norm(
        *(given["x"], *running, given["weight"], given["bias"], c.training, c.momentum, c.eps),
        residual=given.get("residual"),
        act=e.act,
        negative_slope=e.slope,
    )
    gradients = torch.autograd.grad(y, list(given.values()), c.dy)
    found = {f"d{name}": t for name, t in zip(given, gradients, strict=True)}
    return found | {"y": y.detach(), "running_mean": running[0], "running_var": running[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (16, 8, 16, 16),
        (8, 64, 28, 28),
        (64, 64, 56, 56),
        (16, 64, 7, 7),
        (9, 8, 35, 35),
        (5, 7, 9, 9),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_paths(path: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    c = made(shape, dtype, layout)
    check(c)
    there = on("cuda", c)
    first = run(bnorm_ext.batch_norm, there)
    assert all(same_bits(run(bnorm_ext.batch_norm, there), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("act", "add"), FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (16, 3, 65, 37), (8, 64, 7, 7)], ids=str)
def test_fused(
    shape: tuple[int, ...], layout: str, act: str, add: bool, dtype: torch.dtype
) -> None:
    """Activation and residual, beside native's operators one after the other."""
    for training in (True, False):
        c, e = fused(shape, dtype, layout, act, add, training=training)
        c = without_kinks(c, e)
        there = on("cuda", c)
        residual = None if e.residual is None else e.residual.cuda()
        epilogue = Epilogue(e.act, e.slope, residual)
        ours = run_fused(there, epilogue)
        again = run_fused(there, epilogue)
        assert same_bits(ours, again)
        assert_right(c, e, cpu(ours), cpu(native(there, epilogue)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", PIECEWISE)
@pytest.mark.parametrize(("shape", "layout"), SHAPES_AND_LAYOUTS)
def test_mask(shape: tuple[int, ...], layout: str, act: str, dtype: torch.dtype) -> None:
    """Gradients through the mask have the bits of those through the residual."""
    c, e = fused(shape, dtype, layout, act, True)
    c, residual = on("cuda", c), e.residual.cuda()
    how = (e.act, e.slope)
    _, mean, rstd, mask = torch.ops.bnorm_ext.batch_norm_training(
        *(c.x, residual, c.weight, c.bias, None, None, None, 0.1, c.eps, *how, True)
    )
    through_mask, through_residual = (
        torch.ops.bnorm_ext.batch_norm_backward(
            *(c.dy, c.x, given, c.weight, c.bias, None, None, mean, rstd, True, c.eps),
            *(bits, *how, [True] * 4),
        )
        for given, bits in ((None, mask), (residual, None))
    )
    assert mask.numel() > 0
    assert all(map(torch.equal, through_mask, through_residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_mean_far_from_zero(layout: str, mean: float) -> None:
    c = case(normal((16, 8, 28, 28), seed=3, mean=mean), torch.float32, layout=layout)
    check(c, beside_native=False)


def test_float16_products_beyond_its_range() -> None:
    """Native rounds dy * (x - mean) to 16 bit in contiguous layout, where this overflows."""
    c = made((8, 4, 16, 16), torch.float16, "contiguous")
    check(c.but(x=c.x * 100, dy=c.dy * 1000))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_from_run_to_run(dtype: torch.dtype, layout: str) -> None:
    c = on("cuda", made((32, 64, 28, 28), dtype, layout))
    first = run(bnorm_ext.batch_norm, c)
    for _ in range(20):
        assert same_bits(run(bnorm_ext.batch_norm, c), first)


def test_nothing_waits_for_the_device() -> None:
    net = bnorm_ext.BatchNorm2d(16, momentum=None, device="cuda")
    x = torch.randn(4, 16, 8, 8, device="cuda", requires_grad=True)
    net(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sum().backward()
        net.eval()(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_side_by_side(path: str) -> None:
    """The semaphores of one stream are not those of another."""
    c = on("cuda", made((32, 2, 64, 64), torch.float32, "contiguous"))
    right = run(bnorm_ext.batch_norm, c)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _, stream in itertools.product(range(25), streams):
        with torch.cuda.stream(stream):
            found.append(bnorm_ext.batch_norm(c.x, None, None, c.weight, c.bias, True))
    torch.cuda.synchronize()
    assert all(torch.equal(y, right["y"]) for y in found)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_captured_step(path: str, momentum: float | None) -> None:
    """Forward and backward in a CUDA graph, replayed: as eager steps, the counter too."""
    torch.manual_seed(0)
    captured = bnorm_ext.BatchNorm2d(16, momentum=momentum, device="cuda")
    eager = bnorm_ext.BatchNorm2d(16, momentum=momentum, device="cuda")
    x = torch.randn(8, 16, 32, 32, device="cuda", requires_grad=True)

    def step(net: nn.Module) -> torch.Tensor:
        y = net(x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), (x, *params))])

    params = list(captured.parameters())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured)
    torch.cuda.current_stream().wait_stream(side)
    captured.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step(captured)
    captured.reset_running_stats()
    params = list(eager.parameters())
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(gradients, step(eager))
    for name, t in eager.state_dict().items():
        assert torch.equal(t, captured.state_dict()[name]), name


def test_batch_over_65535_in_inference() -> None:
    c = made((70000, 4, 1, 2), torch.float32, "contiguous", training=False)
    ours = run(bnorm_ext.batch_norm, on("cuda", c))
    assert_promise(c, ours=cpu(ours))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("less than 30 GiB of free GPU memory")
    memory_format = getattr(
        torch, "channels_last" if layout == "channels_last" else "contiguous_format"
    )
    x = torch.empty(
        (33, 64, 1024, 1024), dtype=torch.bfloat16, device="cuda", memory_format=memory_format
    )
    x.normal_().add_(torch.arange(64, device="cuda").view(1, -1, 1, 1))
    running_mean, running_var = torch.zeros(64, device="cuda"), torch.zeros(64, device="cuda")
    y = bnorm_ext.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    torch.testing.assert_close(
        running_mean, torch.arange(64.0, device="cuda"), rtol=1e-3, atol=2e-3
    )
    torch.testing.assert_close(running_var, torch.ones(64, device="cuda"), rtol=1e-2, atol=0)
    # The last sample lies beyond 2^31 elements in either layout.
    xhat = (x[32].float() - running_mean.view(-1, 1, 1)) * running_var.rsqrt().view(-1, 1, 1)
    torch.testing.assert_close(y[32].float(), xhat, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_device_that_is_not_the_current_one() -> None:
    check(made((8, 16, 14, 14), torch.float32, "contiguous"), device="cuda:1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_under_autocast(layout: str) -> None:
    """A conv net in float16 with a scaler: as with native's modules."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)
    ).cuda()
    x = torch.randn(8, 3, 16, 16, device="cuda")
    if layout == "channels_last":
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    gradients = []
    for _ in range(2):
        net.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = net(x).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        net = bnorm_ext.convert_batchnorm(net)
    for right, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-2, atol=2e-3)
