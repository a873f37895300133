"""Random modules of ours and their native twins on random inputs, right or wrong: outputs,
gradients, running statistics, counters, exceptions and their texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bnorm_ext
from tests.common.cases import DTYPES
from tests.common.fused_cases import ACTS, SLOPE, activate
from tests.common.likeness import assert_like
from tests.common.strategies import ORDINARY, REFUSED_DTYPES, Draw, seeds, shapes, views
from tests.common.twins import NATIVE, OURS, outcome

# Where buffers overlap, native's result depends on which channel comes first.
pytestmark = pytest.mark.usefixtures("one_thread")

ACT = {d: getattr(bnorm_ext, f"BatchNormAct{d}d") for d in (1, 2, 3)}


@st.composite
def inputs(draw: st.DrawFn, dims: int) -> Draw:
    """Mostly of a rank, and with channels, that the module takes."""
    shape = draw(shapes(2, 5, most=512))
    wanted = {1: (2, 3), 2: (4,), 3: (5,)}[dims]
    if draw(st.integers(0, 9)) < 9:
        rank = draw(st.sampled_from(wanted))
        shape = (*shape, 2, 1, 3)[:rank]
    if draw(st.integers(0, 9)) < 9:
        shape = (shape[0], 3, *shape[2:])
    return Draw(
        shape, torch.float64, draw(views(len(shape))), draw(st.sampled_from(list(ORDINARY))),
        draw(seeds()),
    )  # fmt: skip


def live(module: nn.Module, act: str, drawn: list[Draw], kind: torch.dtype) -> Any:
    """Two steps; outcomes and what they made. A native module gets its activation here."""
    outcomes, results = [], {}
    for i, draw in enumerate(drawn):
        x = draw.build().to(kind)
        if x.is_floating_point():
            x.requires_grad_()

        def step(x: Tensor = x, i: int = i) -> None:
            y = module(x)
            y = activate(y, act) if type(module) in NATIVE.values() else y
            results[f"y{i}"] = y.detach()
            if x.requires_grad:
                y.backward(torch.ones_like(y))
                results[f"dx{i}"] = x.grad

        before = {n: b.clone() for n, b in module.named_buffers()}
        outcomes.append(outcome(step))
        if outcomes[-1] is not None:
            if type(module) not in NATIVE.values():
                for n, b in module.named_buffers():
                    assert torch.equal(b, before[n]), n
            break  # native has counted the batch that it refused
        for n, b in module.named_buffers():
            results[f"{n}{i}"] = b.clone()
    results |= {f"d{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return outcomes, results


@given(st.data())
def test_module(data):
    draw = data.draw
    dims = draw(st.sampled_from([2, 1, 3]), "dims")
    act = draw(st.sampled_from(ACTS), "act")
    options: dict[str, Any] = {
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0, 1e-5, 0.0, -1.0, float("nan")]), "eps"),
        "momentum": draw(st.sampled_from([0.1, None, 0.0, 1.0, 0.7, -0.5]), "momentum"),
        "affine": draw(st.booleans(), "affine"),
        "track_running_stats": draw(st.sampled_from([True, True, False]), "track"),
        "dtype": draw(st.sampled_from(DTYPES), "dtype"),
    }
    training = draw(st.booleans(), "training")
    native = NATIVE[dims](3, **options)
    with torch.no_grad():
        for i, t in enumerate([*native.parameters(), *list(native.buffers())[:2]]):
            t.copy_(torch.tensor([0.5, 1.5, 1.0]) + i)
    if act == "identity":
        ours = OURS[dims](3, **options)
    else:
        ours = ACT[dims](3, **options, act=act, negative_slope=SLOPE)
    ours.load_state_dict(native.state_dict())
    late = draw(st.sampled_from(["", "", "", "momentum", "track_running_stats", "eps"]), "late")
    for module in (native, ours):
        module.train(training)
        if late:
            setattr(
                module, late, {"momentum": None, "track_running_stats": False, "eps": 0.5}[late]
            )
    drawn = [draw(inputs(dims), "input") for _ in range(2)]
    kind = draw(st.sampled_from([options["dtype"]] * 6 + DTYPES + REFUSED_DTYPES), "input dtype")
    theirs, mine = (live(m, act, drawn, kind) for m in (native, ours))
    assert mine[0] == theirs[0]
    if theirs[0][-1] is not None:  # of native's, statistics and counter may have changed
        return
    results = [mine[1], theirs[1]]
    if act in ("relu6", "hardswish") and any(
        t.isnan().any() for n, t in theirs[1].items() if n.startswith("y")
    ):
        # Torch's derivative at nan is 0 or 1, by the place in a vector of the processor.
        results = [{n: t for n, t in r.items() if not n.startswith("d")} for r in results]
    assert_like(*results, kind, strides=act == "identity")
