"""Running statistics have no derivative: gradients, tangents and maps over them are refused where
native refuses them, in its words, and ignored where native ignores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import bnorm_ext
from tests.common.twins import outcome

f64 = torch.float64
x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
GIVEN = {
    "x": x,
    "running_mean": torch.zeros(3, dtype=f64),
    "running_var": torch.ones(3, dtype=f64),
    "weight": torch.tensor([1.0, -0.5, 2.0], dtype=f64),
    "bias": torch.tensor([0.5, 0.0, -1.0], dtype=f64),
}
BUFFERS = ("running_mean", "running_var")
CHOICES = [
    ("running_mean",),
    ("running_var",),
    ("running_mean", "running_var"),
    ("x", "running_mean"),
    ("weight", "running_var"),
    ("bias", "running_mean"),
]


def dual(f: Callable[..., Tensor], *values: Tensor) -> Any:
    """The value and its tangent; None where there is none."""
    with forward_ad.dual_level():
        y = f(*[forward_ad.make_dual(v, torch.ones_like(v)) for v in values])
        return tuple(forward_ad.unpack_dual(y))


def ones(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ones_like(v) for v in values)


USES: dict[str, Callable[..., Any]] = {
    "dual numbers": dual,
    "jvp": lambda f, *v: jvp(f, v, ones(v)),
    "jvp of jvp": lambda f, *v: jvp(lambda *w: jvp(f, w, ones(v))[1], v, ones(v)),
    "jacfwd": lambda f, *v: jacfwd(f)(*v),
    "grad": lambda f, *v: grad(lambda *w: f(*w).square().sum(), len(v) - 1)(*v),
    "grad of an outer variable": lambda f, *v: grad(
        lambda *w: grad(lambda s: (f(*w) * s).sum())(w[0].sum())
    )(*v),
    "vjp": lambda f, *v: vjp(f, *v)[0],
    "jacrev": lambda f, *v: jacrev(f, len(v) - 1)(*v),
    "vmap": lambda f, *v: vmap(f)(*[torch.stack([t, t + 1]) for t in v]),
    "grad of vmap": lambda f, *v: grad(lambda *w: vmap(f)(*w).sum(), len(v) - 1)(
        *[torch.stack([t, t + 1]) for t in v]
    ),
    "vmap of grad": lambda f, *v: vmap(grad(lambda *w: f(*w).sum(), len(v) - 1))(
        *[torch.stack([t, t + 1]) for t in v]
    ),
    "requires_grad": lambda f, *v: f(*[t.clone().requires_grad_() for t in v]),
    "requires_grad and no_grad": lambda f, *v: torch.no_grad()(f)(
        *[t.clone().requires_grad_() for t in v]
    ),
    "requires_grad, vmap over x": lambda f, *v: vmap(
        lambda t: f(*[w.clone().requires_grad_() for w in v]) + t
    )(torch.zeros(2, dtype=f64)),
}


CASES = [
    (use, choice, training)
    for use in USES
    for choice in CHOICES
    for training in (True, False)
    # Two faults at once: a shared buffer would be updated besides.
    if not (use == "vmap of grad" and choice[0] == "x" and training)
]


@pytest.mark.parametrize("act", ["identity", "relu"])
@pytest.mark.parametrize(("use", "choice", "training"), CASES, ids=str)
def test_like_native(use, choice, training, act):
    results = []

    def attempt(function: Callable[..., Tensor]) -> None:
        def f(*values: Tensor) -> Tensor:
            t = {name: v.clone() for name, v in GIVEN.items()} | dict(
                zip(choice, values, strict=True)
            )
            return function(
                t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], training
            )

        results.append(USES[use](f, *[GIVEN[name].clone() for name in choice]))

    activate = F.relu if act == "relu" else (lambda y: y)
    outcomes = [
        outcome(lambda: attempt(lambda *a: bnorm_ext.batch_norm(*a, act=act))),
        outcome(lambda: attempt(lambda *a: activate(F.batch_norm(*a)))),
    ]
    assert outcomes[0] == outcomes[1]
    if outcomes[0] is None:
        # float64 and values below 10
        torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@pytest.mark.parametrize("choice", CHOICES[:3], ids="-".join)
def test_statistics_mapped_beside_an_input_that_is_not(choice):
    """Mapped statistics are updated each, shared ones once: as a loop over the mapped ones would,
    did it write the shared ones once."""
    mapped = {n: torch.stack([GIVEN[n], GIVEN[n] + 1]) for n in choice}
    shared = {n: GIVEN[n].clone() for n in BUFFERS if n not in choice}

    def f(*values: Tensor) -> Tensor:
        t = {**shared, **dict(zip(choice, values, strict=True))}
        return bnorm_ext.batch_norm(x, t["running_mean"], t["running_var"], training=True)

    y = vmap(f)(*mapped.values())
    for i in range(2):
        alone = {n: GIVEN[n] + i if n in choice else GIVEN[n].clone() for n in BUFFERS}
        right = F.batch_norm(x, alone["running_mean"], alone["running_var"], training=True)
        torch.testing.assert_close(y[i], right, rtol=0, atol=1e-12)
        for n in choice:
            torch.testing.assert_close(mapped[n][i], alone[n], rtol=0, atol=1e-12)
        for n, t in shared.items():
            torch.testing.assert_close(t, alone[n], rtol=0, atol=1e-12)


def test_counter_shared_by_mapped_statistics():
    module = bnorm_ext.BatchNorm2d(3, dtype=f64)
    buffers = {n: torch.stack([GIVEN[n], GIVEN[n] + 1]) for n in BUFFERS}
    vmap(lambda given: functional_call(module, given, (x,)))(buffers)
    assert module.num_batches_tracked == 1
    cumulative = bnorm_ext.BatchNorm2d(3, dtype=f64, momentum=None)
    counters = {"num_batches_tracked": torch.tensor([1, 2])}
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda given: functional_call(cumulative, given, (x,)))(counters)
