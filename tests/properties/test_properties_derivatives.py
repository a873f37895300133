"""Second derivatives and forward-mode tangents of random small calls, in float64, as those of
basic operations of torch."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from torch import Tensor
from torch.autograd import forward_ad

import bnorm_ext
from tests.common.cases import normal
from tests.common.fused_cases import KINKS, SLOPE, activate
from tests.common.strategies import VECTORS, Call, calls, shapes

SMALL = calls(
    shape=shapes(most=64, empty=False),
    values=("normal", "shifted"),
    dtypes=(torch.float64,),
    empty=False,
    overlapping_buffers=False,
)
Tensors = dict[str, Tensor]


def leaves(call: Call) -> Tensors:
    given = {n: call.tensor(n) for n in ("x", "weight", "bias", "residual")}
    return {n: t.detach() for n, t in given.items() if t is not None}


def normalised(call: Call, of: Tensors) -> Tensor:
    """By basic operations, which have every derivative; native's own is wrong or refused in some of
    these calls."""
    x, rank = of["x"], of["x"].dim()
    wide = [1, -1, *[1] * (rank - 2)]
    if call.training:
        dims = [0, *range(2, rank)]
        centred = x - x.mean(dims, keepdim=True)
        var = centred.square().mean(dims, keepdim=True)
    else:
        mean, var = (call.tensor(n).clone().reshape(wide) for n in VECTORS[:2])
        centred = x - mean
    y = centred * (var + call.eps).rsqrt()
    y = y * of["weight"].reshape(wide) if "weight" in of else y
    y = y + of["bias"].reshape(wide) if "bias" in of else y
    return y + of["residual"] if "residual" in of else y


def forward(call: Call, of: Tensors, own: bool) -> Tensor:
    act = call.act or "identity"
    if not own:
        return activate(normalised(call, of), act)
    buffers = [call.tensor(n) for n in VECTORS[:2]]
    momentum = 0.1 if call.momentum is None else call.momentum
    return bnorm_ext.batch_norm(
        of["x"], *buffers, of.get("weight"), of.get("bias"), call.training, momentum, call.eps,
        residual=of.get("residual"), act=act, negative_slope=SLOPE,
    )  # fmt: skip


def assume_decided(call: Call) -> None:
    """No value is near a kink, where rounding decides."""
    z = normalised(call, leaves(call))
    assume(all(((z - k).abs() > 1e-6).all() for k in KINKS.get(call.act or "", [])))


def assert_close(name: str, got: Tensor | None, right: Tensor | None) -> None:
    a, b = (torch.zeros(()) if t is None else t.detach() for t in (got, right))
    # A few roundings of float64; 1 / sqrt(eps) enters three times where the variance is small.
    size = max(b.abs().max().item(), 1.0)
    assert (a - b).abs().max().item() <= 1e-7 * size, f"{name}: {a} and {b}"


@given(SMALL)
def test_second_derivatives(call):
    assume_decided(call)
    found = []
    for own in (True, False):
        of = {n: t.clone().requires_grad_() for n, t in leaves(call).items()}
        dy = call.tensor("dy").clone().requires_grad_()
        y = forward(call, of, own)
        first = torch.autograd.grad(y, list(of.values()), dy, create_graph=True)
        total = sum((g * normal(tuple(g.shape), i)).sum() for i, g in enumerate(first))
        second = torch.autograd.grad(total, [*of.values(), dy], allow_unused=True)
        found.append(dict(zip([*of, "dy"], second, strict=True)))
    for name, right in found[1].items():
        assert_close(name, found[0][name], right)


@given(SMALL)
def test_forward_mode(call):
    assume_decided(call)
    found = []
    for own in (True, False):
        with forward_ad.dual_level():
            of = {
                n: forward_ad.make_dual(t.clone(), normal(tuple(t.shape), i))
                for i, (n, t) in enumerate(leaves(call).items())
            }
            y = forward(call, of, own)
            found.append(forward_ad.unpack_dual(y))
    for i, name in enumerate(("y", "tangent")):
        assert_close(name, found[0][i], found[1][i])
