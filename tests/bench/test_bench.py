"""The benchmark's gate and the rows that it measures, never the times in them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from bnorm_ext.bench import cases, correct, packages, report, run
from bnorm_ext.bench.cases import Case
from bnorm_ext.bench.providers import Provider, Unavailable, functional_layer

CPU = torch.device("cpu")
SMALL = (4, 3, 5, 6)


# --- the gate -------------------------------------------------------------------------------------


class Planted(Provider):
    """torch's batch norm with something done to it."""

    name = "planted"

    def __init__(self, after=None, **changes):
        self.after, self.changes = after, changes

    def make(self, case, i):
        def function(x, r, mean, var, weight, bias, training):
            given = {"momentum": correct.MOMENTUM, "eps": correct.EPS} | self.changes
            y = F.batch_norm(x, mean, var, weight, bias, training, **given)
            if r is not None:
                y = y + r
            y = y if case.op == "bn" else y.relu()
            return y if self.after is None else self.after(y, x)

        return functional_layer(function, case, i)


def verdict(provider, case):
    i = correct.make_inputs(case, CPU)
    return run.gate(case, i, provider, correct.reference(case, i, training=case.training))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("pass_", cases.PASSES)
def test_what_is_right_passes(dtype, layout, op, pass_):
    case = Case((6, 5, 7, 4), dtype, layout, op, pass_)
    names = ["torch", "bnorm_ext"] if op == "bn" else ["torch"]
    for provider in [*packages.make(names), Planted()]:
        assert verdict(provider, case) == run.Verdict(True), provider.name


class NoMeanGradient(torch.autograd.Function):
    """The identity, whose gradient leaves out a little of what it gets."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy - 1e-3 * dy.mean()


WRONG = {
    "momentum": (Planted(momentum=0.11), "fwd", "running_"),
    "eps": (Planted(eps=1e-3), "fwd", "y"),
    "one value": (Planted(lambda y, x: y.index_fill(0, torch.tensor([1]), 0)), "fwd", "y"),
    "nan": (Planted(lambda y, x: y * torch.nan), "eval", "y"),
    "a gradient": (Planted(lambda y, x: NoMeanGradient.apply(y)), "bwd", "d"),
    "a gradient that is detached in part": (Planted(lambda y, x: y + 1e-3 * x), "bwd", "dx"),
    "shape": (Planted(lambda y, x: y[:-1]), "eval", "y has shape"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_planted_wrong_provider_is_found(name, dtype):
    provider, pass_, what = WRONG[name]
    found = verdict(provider, Case((6, 5, 7, 4), dtype, pass_=pass_))
    assert found.correct is False
    assert found.reason.startswith(what)


def test_a_provider_that_raises_gives_the_reason():
    def refuse(y, x):
        raise RuntimeError("no such\nkernel")

    assert verdict(Planted(refuse), Case(SMALL)) == run.Verdict(
        None, "RuntimeError: no such kernel"
    )


def test_signs_within_rounding_of_zero_have_no_gradient_to_get_wrong():
    case = Case((8, 4, 16, 16), "bfloat16", op="bn_add_relu", pass_="bwd")
    i = correct.make_inputs(case, CPU)
    before = i.dy.clone()
    correct.reference(case, i, training=True)
    changed = (i.dy != before).double().mean().item()
    assert 0 < changed < 0.1
    assert (i.dy[i.dy != before] == 0).all()


def test_inputs_are_the_same_for_the_same_case():
    a, b = (correct.make_inputs(Case(SMALL, layout="channels_last"), CPU) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert a.x.is_contiguous(memory_format=torch.channels_last)


# --- rows -----------------------------------------------------------------------------------------


def measured(providers, *wanted, seconds=0.001, caches=("cold",)):
    found = run.measure(cases.expand(wanted), providers, CPU, caches, seconds)
    return [row for _, rows in found for row in rows]


FIELDS = {
    "device", "device_name", "dtype", "layout", "shape", "op", "pass", "provider", "median_us",
    "p10_us", "p90_us", "bytes_floor", "gbps", "copy_fraction", "correct",
}  # fmt: skip


def test_rows_have_every_field_and_agree_with_each_other():
    rows = measured(packages.make(["bnorm_ext", "torch"]), Case(SMALL), Case(SMALL, pass_="bwd"))
    assert [r["provider"] for r in rows] == ["copy", "bnorm_ext", "torch"] * 2
    for row in rows:
        assert set(row) >= FIELDS
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["gbps"] == pytest.approx(row["bytes_floor"] / row["median_us"] / 1e3, rel=1e-3)
        assert row["rounds"] >= 5
    copy, ours, native = rows[:3]
    assert copy["copy_fraction"] == 1
    assert ours["ratio"] == pytest.approx(native["median_us"] / ours["median_us"], rel=1e-3)
    assert ours["copy_fraction"] == pytest.approx(ours["gbps"] / copy["gbps"], rel=1e-2)
    assert native["ratio"] == 1
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("pass_", cases.PASSES)
@pytest.mark.parametrize("op", cases.OPS)
def test_every_pass_of_every_operation_can_be_timed(op, pass_):
    rows = measured(packages.make(["torch"]), Case(SMALL, op=op, pass_=pass_), caches=("warm",))
    assert rows[1]["correct"] is True
    assert rows[1]["median_us"] > 0


def test_a_wrong_provider_is_marked_and_not_ranked():
    rows = measured([Planted(eps=1e-3), *packages.make(["torch"])], Case(SMALL))
    wrong = rows[1]
    assert wrong["correct"] is False
    assert wrong["ratio"] is None
    text = report.table(rows)
    assert "wrong[1]" in text
    assert "[1] y is off" in text
    [mean] = [line for line in text.splitlines() if line.startswith("planted ")]
    assert mean.split()[-1] == "0"


def test_nothing_is_compared_with_a_wrong_baseline(monkeypatch):
    monkeypatch.setattr(run, "BASELINE", "planted")
    rows = measured([*packages.make(["torch"]), Planted(eps=1e-3)], Case(SMALL))
    assert [r["ratio"] for r in rows] == [None] * 3


def test_what_is_not_there_is_listed_with_the_reason():
    rows = measured(packages.make(["bnorm_ext-unfused", "torch"]), Case(SMALL, op="bn"))
    assert rows[1]["median_us"] is None
    assert rows[1]["reason"] == "bnorm_ext-unfused has no bn"
    assert "unavailable: bnorm_ext-unfused: bnorm_ext-unfused has no bn" in report.table(rows)


@pytest.mark.parametrize("op", ["bn_relu", "bn_add_relu"])
def test_fused_operations_are_measured_beside_unfused_ones(op):
    names = ["bnorm_ext", "bnorm_ext-unfused", "torch"]
    for pass_ in ("fwd", "bwd", "fwd+bwd", "eval"):
        rows = measured(packages.make(names), Case(SMALL, op=op, pass_=pass_))
        assert [r["provider"] for r in rows[1:]] == names
        assert all(r["correct"] is True for r in rows[1:])


def test_what_is_only_for_fused_operations_is_measured_by_default_with_these_alone():
    assert "bnorm_ext-unfused" not in packages.available("cpu", {"bn", "bn_relu"})
    assert "bnorm_ext-unfused" in packages.available("cpu", {"bn_relu", "bn_add_relu"})


def test_a_provider_that_fails_later_does_not_end_the_run():
    calls = []

    def third_time(y, x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return y

    rows = measured([Planted(third_time), *packages.make(["torch"])], Case(SMALL))
    assert rows[1]["reason"] == "RuntimeError: out of luck"
    assert rows[2]["correct"] is True


def test_packages_that_are_not_installed_say_so():
    class Absent(packages.Package):
        name, module = "absent", "no_such_package_of_batch_norms"

    with pytest.raises(Unavailable, match="no_such_package"):
        Absent().version()
    assert verdict(Absent(), Case(SMALL)).correct is None


def test_compiling_stops_when_its_allowance_is_used_up():
    [provider] = packages.make(["torch.compile"])
    provider.allowance = 0
    found = verdict(provider, Case(SMALL))
    assert found.correct is None
    assert "--provider torch.compile" in found.reason
