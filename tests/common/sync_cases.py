"""Cases of a batch that is split between processes, and what one process with all of it gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bnorm_ext.distributed import collectives

C = 5  # channels


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float64
    sizes: tuple[int, ...] = (4, 4, 4)  #: samples of each rank, the first WORLD of them
    act: str | None = None
    residual: bool = False
    mean: float = 0.0  #: of the input, in standard deviations
    channels_last: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    summed: bool = False  #: the way of many ranks and channels
    steps: int = 1


def whole(case: Case, world: int) -> list[tuple[torch.Tensor, ...]]:
    """Input, residual and gradient of the output, of each step."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for _ in range(case.steps):
        shape = (sum(case.sizes[:world]), C, 3, 5)
        x, r, dy = (torch.randn(shape, dtype=torch.float64, generator=rng) for _ in range(3))
        x = x * torch.arange(1, C + 1).view(1, C, 1, 1) + case.mean
        tensors = [t.to(case.dtype) for t in (x, r, dy)]
        if case.channels_last:
            tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
        made.append(tuple(tensors))
    return made


def parameters(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer = layer.to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, C))
            layer.bias.copy_(torch.linspace(-1, 1, C))
    return layer


def run(layer: nn.Module, case: Case, steps: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, (x, r, dy) in enumerate(steps):
        x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x, r) if case.residual else layer(x)
        y.backward(dy)
        found |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
        if case.residual:
            found[f"dresidual{i}"] = r.grad
        found |= {f"d{name}{i}": p.grad.clone() for name, p in layer.named_parameters()}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


def split(rank: int, case: Case, device: str = "cpu") -> dict[str, Any]:
    """This rank's share of the batch on ``device``; the results on the CPU."""
    world = dist.get_world_size()
    layer = parameters(bnorm_ext.SyncBatchNorm(C, act=case.act, **case.options), case.dtype)
    start = sum(case.sizes[:rank])
    part = slice(start, start + case.sizes[rank])
    steps = [tuple(t[part].to(device) for t in step) for step in whole(case, world)]
    given = collectives.GATHER_BYTES
    try:
        collectives.GATHER_BYTES = 0 if case.summed else given
        found = run(layer.to(device), case, steps)
        return {name: None if t is None else t.cpu() for name, t in found.items()}
    finally:
        collectives.GATHER_BYTES = given


class Reference(nn.Module):
    """In double precision, by torch's own operations."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.bn = case, nn.BatchNorm2d(C, **case.options)

    def forward(self, x, residual=None):
        y = self.bn(x)
        if residual is not None:
            y = y + residual
        return y if self.case.act is None else getattr(F, self.case.act)(y)


def expected(case: Case, world: int) -> dict[str, Any]:
    reference = Reference(case)
    parameters(reference.bn, torch.float64)
    steps = [tuple(t.double() for t in step) for step in whole(case, world)]
    return {
        k.removeprefix("bn.").replace("dbn.", "d"): v
        for k, v in run(reference, case, steps).items()
    }


U = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def assert_equal(parts: list[dict[str, Any]], reference: dict[str, Any], case: Case) -> None:
    """To a few units of the dtype, and of the mean that is subtracted, both relative to the largest
    value."""
    own = U[case.dtype]
    wide = own if case.dtype in (torch.float64, torch.float32) else U[torch.float32]
    for name, value in reference.items():
        if name.startswith(("y", "dx", "dresidual")):
            found = torch.cat([part[name] for part in parts])
            unit = own
        elif name.startswith("d"):
            found = sum(part[name].double() for part in parts)
            unit = wide if case.dtype != torch.float16 else own
        else:
            for part in parts[1:]:
                assert torch.equal(part[name], parts[0][name]), name  # the same bits on all ranks
            found, unit = parts[0][name], wide
        assert found.shape == value.shape, name
        scale = value.double().abs().max().clamp(min=1e-30)
        # The input itself is the same for both: what its mean costs is the rounding of x - mean.
        # Sums over 60 to 180 values and three roundings: 16 units.
        allowed = 16 * (
            unit
            + U[torch.float64] * case.mean * 8
            + (wide * case.mean * 2 if wide != U[torch.float64] else 0)
        )
        error = (found.double() - value.double()).abs().max() / scale
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


CASES = {
    "float64": Case(),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "channels_last": Case(channels_last=True),
    "uneven": Case(sizes=(1, 6, 2)),
    "one empty": Case(sizes=(0, 5, 3)),
    "last empty": Case(sizes=(5, 0, 0)),
    "relu": Case(act="relu"),
    "silu": Case(act="silu"),
    "relu, residual": Case(act="relu", residual=True),
    "leaky_relu, residual": Case(act="leaky_relu", residual=True),
    "silu, residual": Case(act="silu", residual=True),
    "hardswish, residual, channels_last": Case(act="hardswish", residual=True, channels_last=True),
    "residual": Case(residual=True),
    "relu6, residual, uneven, bfloat16": Case(
        act="relu6", residual=True, sizes=(2, 3, 0), dtype=torch.bfloat16
    ),
    "mean 1e5": Case(mean=1e5),
    "mean 1e5, float32": Case(mean=1e5, dtype=torch.float32),
    "mean 1e5, summed": Case(mean=1e5, summed=True),
    "summed": Case(summed=True),
    "summed, uneven, relu, residual": Case(summed=True, sizes=(1, 4, 0), act="relu", residual=True),
    "not affine": Case(options={"affine": False}),
    "not tracked": Case(options={"track_running_stats": False}),
    "cumulative average": Case(options={"momentum": None}, steps=3),
    "three steps": Case(steps=3, act="relu"),
}
