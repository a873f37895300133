"""What the tests of the CUDA kernels share, in the emulator and on a GPU: shapes and layouts, cases
with residual and activation, and how far results may be off.

Errors are measured as cases.py says, with these scales: y as there, and max|residual| more;
dresidual max|dy|, dx, dweight and dbias as there, all of them times the largest slope. The bounds
are those of cases.py: (1) beside native's operators one after the other, (2) alone. What rounds
beside what is listed there are the addition and the activation, 4v. The derivatives of silu and
hardswish change by at most a half of the error of z, which is relative to the scale of y: that much
more for gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnorm_ext.activations import NAMES, compose
from bnorm_ext.reference import batch_norm_backward_reference, batch_norm_reference
from tests.common.cases import (
    Case,
    Results,
    case,
    errors,
    measure,
    normal,
    per_channel,
    unit_roundoff,
)
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
# Where the derivative jumps.
KINKS = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0], "hardswish": [-3, 3]}
SLOPE = 0.2
STEEPEST = {"silu": 1.1, "hardswish": 1.5}
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


def pre_activation(c: Case, e: Epilogue) -> Tensor:
    """z in float64."""
    z = batch_norm_reference(
        c.x, c.running_mean, c.running_var, c.weight, c.bias, c.training, 0, c.eps
    ).y
    return z if e.residual is None else z + e.residual.double()


def without_kinks(c: Case, e: Epilogue) -> Case:
    """dy is 0 where z is so close to a kink that rounding decides on its side."""
    z, m = pre_activation(c, e), measure(c)
    u = unit_roundoff(torch.float64 if c.x.dtype == torch.float64 else torch.float32)
    close = 32 * u * (1 + m.ratio) * z_scale(c, e)
    close = close.view(1, -1, *[1] * (c.x.dim() - 2))
    keep = torch.ones_like(z, dtype=torch.bool)
    for kink in KINKS.get(e.act, []):
        keep &= (z - kink).abs() > close
    assert keep.double().mean() > 0.99
    return c.but(dy=torch.where(keep, c.dy, 0).to(c.dy.dtype))


def z_scale(c: Case, e: Epilogue) -> Tensor:
    scale = measure(c).scale["y"]
    return scale if e.residual is None else scale + per_channel(e.residual)


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
    z = pre_activation(c, e).requires_grad_()
    y = compose(z, None, e.act, e.slope)
    (g,) = torch.autograd.grad(y, z, c.dy.double())
    m = measure(c)
    b = batch_norm_backward_reference(
        g, c.x, c.running_mean, c.running_var, c.weight, c.training, c.eps
    )
    m.reference.update(y=y.detach(), dx=b.dx)
    if "dresidual" in ours:
        m.reference["dresidual"] = g
    m.scale.update(y=z_scale(c, e), dresidual=per_channel(c.dy))
    for name in ("dx", "dresidual", "dweight", "dbias"):
        if name in m.scale:
            m.scale[name] = m.scale[name] * STEEPEST.get(e.act, 1)
    if c.weight is not None:
        m.reference["dweight"] = b.dweight
    if c.bias is not None:
        m.reference["dbias"] = b.dbias
    beside, found = errors(native(c, e) if theirs is None else theirs, m), errors(ours, m)
    broken = []
    for name, error in found.items():
        dtype = ours[name].dtype
        u, v = unit_roundoff(dtype), unit_roundoff(torch.float32)
        curved = torch.ones(())
        if e.act in STEEPEST and name.startswith("d") and u <= v:
            curved = 1 + m.scale["y"] / 2
        allowed = max(1.25 * beside[name].max().item(), 4 * u * curved.max().item())
        allowed += 4 * u if dtype == torch.float64 else 0
        if error.max().item() > allowed:
            broken.append(f"{name}: {error.max().item() / u:.3g} u, allowed {allowed / u:.3g} u")
        if dtype == torch.float64:
            continue
        fine = (2 * (1 + m.ratio) + 8) * v
        if e.act in STEEPEST and name.startswith("d"):
            fine = fine * (1 + m.scale["y"] / 2)
        if (worst := (error / (fine + (u if u > v else 0))).max().item()) > 1:
            broken.append(f"{name}: {worst:.3g} x the bound of its channel")
    assert not broken, "\n" + "\n".join(broken)
