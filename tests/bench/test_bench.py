"""The benchmark's figures, never its times: bytes, suites, the gate, rows, JSON, comparison."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from bnorm_ext.bench import cases, compare, correct, nets, packages, report, run
from bnorm_ext.bench.cases import Case
from bnorm_ext.bench.providers import Provider, Unavailable, functional_layer

CPU = torch.device("cpu")
SMALL = (4, 3, 5, 6)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "pass_", "tensors", "masks"),
    [
        ("bn", "fwd", 2, 0),
        ("bn", "eval", 2, 0),
        ("bn", "bwd", 3, 0),
        ("bn", "fwd+bwd", 5, 0),
        ("bn_relu", "fwd", 2, 0),
        ("bn_relu", "eval", 2, 0),
        ("bn_relu", "bwd", 3, 0),
        ("bn_relu", "fwd+bwd", 5, 0),
        ("bn_add_relu", "fwd", 3, 1),
        ("bn_add_relu", "eval", 3, 0),
        ("bn_add_relu", "bwd", 4, 1),
        ("bn_add_relu", "fwd+bwd", 7, 2),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_bytes_at_the_floor(op, pass_, tensors, masks, dtype, size):
    elements = 8 * 16 * 4 * 4
    case = Case((8, 16, 4, 4), dtype, op=op, pass_=pass_)
    assert cases.bytes_floor(case) == tensors * elements * size + masks * elements // 8
    assert cases.ceiling_bytes(case) == tensors * elements * size


def test_a_mask_takes_whole_bytes():
    one = Case((3, 3), op="bn_add_relu")
    assert cases.bytes_floor(one) == 3 * 9 * 4 + 2


# --- nets and suites ------------------------------------------------------------------------------


# Parameters and batch norms: torchvision's own figures.
@pytest.mark.parametrize(
    ("name", "parameters", "norms", "shapes"),
    [
        ("resnet18", 11_689_512, 20, 5),
        ("resnet50", 25_557_032, 53, 12),
        ("mobilenet_v2", 3_504_872, 52, 19),
        ("densenet121", 7_978_856, 121, 65),
    ],
)
def test_nets_are_what_their_names_say(name, parameters, norms, shapes):
    with torch.device("meta"):
        net = nets.NETS[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters
    seen = nets.batch_norm_inputs(name, batch=2)
    assert len(seen) == norms
    assert len({shape for _, shape in seen}) == shapes


def test_first_and_last_layers_of_resnet50():
    seen = nets.batch_norm_inputs("resnet50", batch=2)
    assert seen[0] == ("bn1", (2, 64, 112, 112))
    assert seen[-1][1] == (2, 2048, 7, 7)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", cases.SUITES)
def test_suites_name_each_case_once_and_possible_ones_only(name, device):
    found = cases.suite(name, device, 32)
    assert len(set(found)) == len(found) > 5
    for case in found:
        cases.check(case)
    assert set(cases.expand(found)) == set(found)


def test_a_net_suite_counts_layers():
    found = cases.suite("resnet50", "cpu", 32)
    assert sum(c.count for c in found if c.pass_ == "fwd") == 53


def test_options_take_the_place_of_what_the_suite_says():
    base = [Case(SMALL), Case(SMALL, "bfloat16"), Case(SMALL, pass_="bwd")]
    found = cases.expand(base, dtypes=["float64"])
    assert found == [Case(SMALL, "float64"), Case(SMALL, "float64", pass_="bwd")]
    assert len(cases.expand(base, ops=cases.OPS, passes=cases.PASSES)) == 2 * 3 * 4


def test_cases_that_share_tensors_stand_together():
    base = [Case(SMALL), Case((8, 2)), Case(SMALL, pass_="bwd")]
    assert [c.shape for c in cases.expand(base)] == [SMALL, SMALL, (8, 2)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case((4,)), "N,C"),
        (Case((4, 0, 3)), "positive"),
        (Case((1, 5)), "one value per channel"),
        (Case((4, 5), layout="channels_last"), "channels_last"),
    ],
)
def test_impossible_cases(case, message):
    with pytest.raises(cases.ImpossibleCase, match=message):
        cases.check(case)


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


# --- reports --------------------------------------------------------------------------------------


def row(provider, us, spread=0.01, **fields):
    return {
        "device": "cpu", "device_name": "x", "cache": "cold", "dtype": "float32",
        "layout": "contiguous", "shape": [4, 3], "op": "bn", "pass": "fwd", "provider": provider,
        "median_us": us, "p10_us": us * (1 - spread), "p90_us": us * (1 + spread),
        "first_half_us": us, "second_half_us": us, "bytes_floor": 96, "gbps": 1.0,
        "copy_fraction": 0.5, "correct": None if provider == "copy" else True, "reason": None,
        "ratio": 1.0, "noisy": False, "page_faults": 0, "launch_gaps": False, "count": 1,
        "layer": "", "rounds": 10,
    } | fields  # fmt: skip


def test_table_of_times_and_means():
    rows = [row("copy", 5), row("bnorm_ext", 10, ratio=4.0), row("torch", 40)]
    rows += [
        row("copy", 5, shape=[8, 3]),
        row("bnorm_ext", 10, ratio=1.0, noisy=True, shape=[8, 3]),
    ]
    lines = report.table(rows).splitlines()
    assert lines[2].split() == [
        "4x3", "fp32", "contiguous", "bn", "fwd", "cold", "10", "40", "5", "1.0", "50", "4.00"
    ]  # fmt: skip
    assert lines[3].split()[6:] == ["10~", "-", "5", "1.0", "50", "1.00~"]
    assert any(line.split() == ["bnorm_ext", "2.00", "2.00", "50", "2"] for line in lines)
    assert any(line.startswith("~ ") for line in lines)


def test_geometric_mean():
    assert report.geometric_mean([4, 1, 0.25]) == pytest.approx(1)
    assert math.isnan(report.geometric_mean([]))


def test_json_is_read_as_it_was_written(tmp_path):
    rows = [row("torch", 40), row("bnorm_ext", 10)]
    report.write_json(tmp_path / "a.json", {"date": "today"}, rows)
    assert report.read_json(tmp_path / "a.json") == ({"date": "today"}, rows)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"header": {}, "rows": [{}]}', "[1]"])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="not a file that --json wrote"):
        report.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("old", "new", "real"),
    [
        (row("torch", 100), row("torch", 80), True),
        (row("torch", 100), row("torch", 99), False),  # under two percent
        (row("torch", 100, spread=0.3), row("torch", 80), False),  # spread
        (row("torch", 100), row("torch", 80, first_half_us=110), False),  # drift
    ],
)
def test_changes_beyond_the_noise(old, new, real):
    [change] = compare.changes([old], [new])
    assert change.real is real


def test_comparison_says_what_changed():
    old = [row("torch", 100), row("bnorm_ext", 50), row("torch", 1, shape=[9, 9])]
    new = [row("torch", 100), row("bnorm_ext", 100, correct=False), row("timm", 5)]
    header = {"device_name": "x", "versions": {"torch": "1"}}
    text = compare.report((header, old), (header | {"versions": {"torch": "2"}}, new))
    assert "torch: 1 -> 2" in text
    assert "SLOWER was right, is wrong" in text
    assert (
        "bnorm_ext: geometric mean 0.50 over 1 cases; beyond the noise 0 faster, 1 slower" in text
    )
    assert "1 rows are in the old file alone" in text
    assert "1 rows are in the new file alone" in text
    assert "hardly comparable" not in text
    other = compare.report((header, old), (header | {"device_name": "y"}, new))
    assert "differ in device_name" in other


def test_numbers_have_four_digits():
    assert [report.number(us) for us in (1.23456, 123.456, 123456)] == ["1.235", "123.5", "123,456"]
