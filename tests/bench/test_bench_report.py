"""The benchmark's tables, JSON and comparisons of two runs."""

from __future__ import annotations

import math

import pytest

from bnorm_ext.bench import compare, report


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
