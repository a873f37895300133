"""What the tests of the CUDA kernels share, in the emulator and on a GPU: shapes and layouts, cases
with residual and activation, and how far results may be off (`bnorm_ext/bench/promise.py`)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bnorm_ext.activations import NAMES, compose
from bnorm_ext.bench import promise
from tests.common.cases import Case, Results, assert_kept, case, normal
from tests.common.emulated import Epilogue

# (N, C, spatial...): with the reason.
SHAPES = {
    "vectors": (4, 6, 4, 8),
    "many blocks per channel": (8, 2, 32, 48),
    "one channel": (6, 1, 24, 40),
    "many channels": (2, 300, 2, 2),
    "odd everything": (3, 5, 7, 3),
    "odd, many blocks": (5, 3, 37, 29),
    "one sample": (1, 7, 9, 5),
    "one position": (64, 24, 1, 1),
    "one position, odd": (37, 13, 1, 1),
    "two values": (2, 3, 1, 1),
    "rows longer than a block": (2, 3, 1, 4096),
    "3 channels, as an image": (2, 3, 40, 40),
    "1-D": (16, 40),
    "1-D, long": (5000, 3),
    "3-D": (2, 4, 3, 4, 6),
    "groups of channels": (6, 16, 7, 7),
    "groups, many blocks": (37, 4, 3, 7),
    "groups in pieces": (3, 8, 17, 17),
}
LAYOUTS = ["contiguous", "channels_last"]
# channels_last is of four and five dimensions.
SHAPES_AND_LAYOUTS = [
    pytest.param(shape, layout, id=f"{name}-{layout}")
    for name, shape in SHAPES.items()
    for layout in LAYOUTS[: 1 if len(shape) < 4 else 2]
]


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str, **kwargs: object) -> Case:
    if layout == "channels_last":
        layout = {2: "contiguous", 5: "channels_last_3d"}.get(len(shape), layout)
    x = normal(shape, seed=7, mean=0.5, std=2)
    return case(x, dtype, layout=layout, **kwargs)  # type: ignore[arg-type]


def same_bits(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PIECEWISE = ["relu", "relu6", "leaky_relu"]
SLOPE = 0.2
STEEPEST = promise.SLOPE  # the smooth ones
FUSED = [(act, residual) for act in NAMES for residual in (False, True)][1:]


def fused(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, act: str, add: bool, **kwargs: object
) -> tuple[Case, Epilogue]:
    """A case and what follows it; z goes beyond every kink."""
    c = made(shape, dtype, layout, **kwargs)
    if c.weight is not None:
        c = c.but(weight=c.weight * 3)
    residual = None
    if add:
        residual = torch.empty_like(c.x).copy_(normal(shape, seed=11, std=2))
    return c, Epilogue(act, SLOPE, residual)


def known(e: Epilogue) -> promise.Epilogue:
    return promise.Epilogue(e.residual, e.act, e.slope)


def without_kinks(c: Case, e: Epilogue) -> Case:
    """dy is 0 where z is so close to a kink that rounding decides on its side."""
    found = promise.away_from_kinks(c, known(e))
    changed = (found.dy == 0) & (c.dy != 0)
    assert changed.double().mean() < 0.01
    return found


def native(c: Case, e: Epilogue) -> Results:
    """torch's operators one after the other."""
    leaves = {"x": c.x, "residual": e.residual, "weight": c.weight, "bias": c.bias}
    given = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    running = [t if t is None else t.clone() for t in (c.running_mean, c.running_var)]
    z = F.batch_norm(
        *(given["x"], *running, given.get("weight"), given.get("bias")),
        *(c.training, c.momentum, c.eps),
    )
    if e.residual is not None:
        z = z + given["residual"]
    z.retain_grad()
    y = compose(z, None, e.act, e.slope)
    y.backward(c.dy)
    found = {"y": y.detach(), "dresidual": z.grad}
    found |= {f"d{name}": t.grad for name, t in given.items() if name != "residual"}
    found |= dict(zip(("running_mean", "running_var"), running, strict=True))
    return {name: t for name, t in found.items() if t is not None}


def assert_right(c: Case, e: Epilogue, ours: Results, theirs: Results | None = None) -> None:
    """Against float64: both bounds of this file, for every result. `theirs`: native's, where they
    come from elsewhere than the CPU."""
    theirs = native(c, e) if theirs is None else theirs
    given = known(e)
    if "dresidual" in ours and e.residual is None:  # the gradient of z
        given = given._replace(residual=torch.zeros_like(c.x))
    assert_kept(promise.shares(ours, theirs, promise.measure(c, given), given))
