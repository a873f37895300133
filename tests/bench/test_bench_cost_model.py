"""bench.cost_model: what it predicts, how that compares with a measured H200, and the committed
table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bnorm_ext import explain
from bnorm_ext._gpus import Device, resolve_device
from bnorm_ext.bench import cost_model
from bnorm_ext.bench.cost_model import FORMATS, mean_share, predict
from bnorm_ext.explain import launch_plan

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
H200 = resolve_device("H200")
COPY = 0.875 * 4.8e6  # bytes a microsecond


@pytest.mark.parametrize(
    ("dtype", "layout", "path", "reads"),
    [
        (torch.float64, "contiguous", "two_pass", 2),
        (torch.float32, "channels_last", "grid", 2),
        (torch.float32, "contiguous", "block", 1),
    ],
)
@pytest.mark.parametrize("tensors", [1, 2])
def test_bytes_by_the_path(
    dtype: torch.dtype, layout: str, path: str, reads: int, tensors: int
) -> None:
    """What is read again comes from the L2 up to 0.31 of it."""
    found = predict((128, 1024, 8, 8), dtype, layout, tensors, H200)
    assert (found.path, found.on_chip) == (path, reads == 1)
    tensor = 128 * 1024 * 8**2 * dtype.itemsize
    moved = (reads * tensors + 1) * tensor
    moved -= 0 if reads == 1 else min(tensors * tensor, 0.31 * H200.l2_bytes)
    assert found.times["memory"] == pytest.approx(moved / COPY)
    assert found.floor == pytest.approx(3.1 + (tensors + 1) * tensor / COPY)
    assert found.floor < found.time <= found.two_passes


def test_a_faster_gpu_takes_less() -> None:
    shape = (64, 256, 28, 28)
    times = [
        predict(shape, torch.bfloat16, "channels_last", 1, resolve_device(name)).time
        for name in ("L4", "RTX 4090", "A100", "H100", "H200")
    ]
    assert times == sorted(times, reverse=True)


def test_shares() -> None:
    assert mean_share([(1.0, 2.0, 1), (1.0, 8.0, 1)]) == pytest.approx(0.25)
    assert mean_share([(1.0, 2.0, 3), (1.0, 32.0, 1)]) == pytest.approx(0.25)


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--net", "resnet18", "--batch", "8", "--dtype", "bfloat16", "--device"]
    assert cost_model.main([*arguments, "NVIDIA H200", "--layout", "contiguous"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicted, not measured; us")
    (large,) = [x for x in lines if "8x64x112x112" in x and "fwd" in x]
    assert large.split()[4] == "cluster"
    (small,) = [x for x in lines if "8x256x14x14" in x and "bwd" in x]
    assert small.split()[4] == "block"
    assert small.split(", ")[-1].startswith("launches and barriers x ")
    assert lines[-1].startswith("H200      resnet18         8 bfloat16  contiguous     fwd ")
    assert lines[-1].count("on chip 20/20") == 2
    assert cost_model.main([*arguments, "H200", "L4", "--layout", "channels_last", "--sums"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["H200", "L4"]
    assert all(line.count("on chip  0/20") == 2 for line in lines[1:])


def test_a_bandwidth_in_place_of_the_data_sheets(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--net", "resnet18", "--batch", "64", "--dtype", "float32", "--sums"]
    for bandwidth in ("4.2e12", "2.1e12"):
        assert cost_model.main([*arguments, "--bandwidth", bandwidth]) == 0
    assert cost_model.main(arguments) == 0
    given, half, sheet = (x.split("\n", 1)[1] for x in _runs(capsys.readouterr().out))
    assert given == sheet != half


def _runs(printed: str) -> list[str]:
    return ["predicted" + part for part in printed.split("predicted")[1:]]


def test_float64_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost_model.main(["--dtype", "float64"])
    assert "there is no prediction of float64 on H200" in capsys.readouterr().err


def test_the_committed_table_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = RESULTS / "predicted.md"
    if not file.exists():
        pytest.skip("bench/results is not here")
    assert cost_model.main(["--table"]) == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")


# --- against a measured H200 ----------------------------------------------------------------------


def _plan(row: dict[str, Any], tensors: int) -> dict[str, Any]:
    """By the limits of an H200."""
    x = torch.empty(
        row["shape"],
        dtype=getattr(torch, row["dtype"]),
        device="meta",
        memory_format=FORMATS[row.get("layout", "contiguous")],
    )
    return launch_plan(x, tensors, H200)


def _kernels(step: str) -> list[float]:
    """Measured over predicted times of the kernels alone, where the path that was measured is the
    one that the plan takes by the limits of the device. Without backward of groups of channels,
    of which a multiprocessor had one block then and has two now."""
    steps = json.loads((RESULTS / "cuda-kernels.json").read_text())["steps"]
    found = []
    for row in steps[step]:
        for tensors, name in ((1, "forward"), (2, "backward")):
            path, measured = row[name]
            dtype, shape = getattr(torch, row["dtype"]), tuple(row["shape"])
            one = predict(shape, dtype, row["layout"], tensors, H200)
            if tensors == 2 and _plan(row, tensors)["mapping"] == "channel_groups":
                continue
            if path == "two_pass":
                found.append(measured / one.two_passes)
            elif path == one.path:
                found.append(measured / one.time)
    return found


def _calls(file: str) -> list[tuple[str, float]]:
    """Mapping, and measured over predicted time, of whole calls in training by today's plans."""
    found = []
    for row in json.loads((RESULTS / file).read_text())["rows"]:
        is_ours = row["provider"] == "bnorm_ext" and not row.get("replanned")
        if is_ours and row["pass"] in ("fwd", "bwd"):
            plan = _plan(row, 1 if row["pass"] == "fwd" else 2)
            mapping = "32 bits" if row["dtype"] == "float32" else plan["mapping"]
            found.append((mapping, row["median_us"] / sum(plan["times"].values())))
    return found


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


@pytest.mark.skipif(not (RESULTS / "cuda-kernels.json").exists(), reason="no bench/results here")
@pytest.mark.parametrize(
    ("step", "rows"),
    [
        ("sweeps with both, first values loaded early, single blocks by cost", 79),
        ("two passes, one wave, two blocks for each multiprocessor", 89),
    ],
)
def test_kernels_of_a_measured_h200(step: str, rows: int) -> None:
    """These are the times to which constants of the model are fitted."""
    ratios = _kernels(step)
    assert len(ratios) >= rows
    assert 0.95 < _mean(ratios) < 1.05
    assert min(ratios) > 0.85
    assert max(ratios) < 1.3


@pytest.mark.skipif(not (RESULTS / "cuda-kernels.json").exists(), reason="no bench/results here")
def test_the_plan_is_among_the_fastest_that_were_measured() -> None:
    """Of some 50 plans for each contiguous layer, those of one, two or three blocks of a
    multiprocessor. An H200 has fewer clusters at once than its limits say, so that not every plan
    by the limits was measured."""
    found = []
    for case in json.loads((RESULTS / "cuda-kernels.json").read_text())["plans"]["cases"]:
        plan = _plan(case, {"forward": 1, "backward": 2}[case["pass"]])
        chosen = [plan["path"], plan["team"], -(-plan["tiles"] // plan["teams"])]
        measured = [case[name] for name in case if name.endswith("at most")]
        times = [us for *how, us in measured if how == chosen]
        if times:
            found.append(times[0] / min(us for *_, us in measured))
    assert len(found) >= 30
    assert _mean(found) < 1.02
    assert max(found) < 1.1


@pytest.mark.skipif(not (RESULTS / "cuda-resnet50.json").exists(), reason="no bench/results here")
def test_calls_of_a_measured_h200() -> None:
    """As bnorm_ext.explain says it."""
    nets = ("resnet50", "mobilenet_v2", "resnet50-batch32", "resnet50-batch256")
    found = [call for net in nets for call in _calls(f"cuda-{net}.json")]
    grouped = [ratio for mapping, ratio in found if mapping == "channel_groups"]
    others = [ratio for mapping, ratio in found if mapping != "channel_groups"]
    assert 0.95 < _mean(others) < 1.1
    assert 0.95 < _mean(grouped) < 1.2
    text = explain((8, 8, 8, 8), device="H200").splitlines()[-1]
    calls, *said = re.findall(r"(?<=H200, )\d+|\d\.\d+", text)
    assert int(calls) == len(found)
    ratios = [ratio for _, ratio in found]
    assert said == [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def test_rates_that_a_device_does_not_say() -> None:
    """No prediction is printed then."""
    unknown = Device("X", 132, (9, 0), 228 << 10, 227 << 10, 60 << 20, 0, 0)
    x = torch.empty(64, 64, 56, 56, device="meta")
    assert sum(launch_plan(x, 1, unknown)["times"].values()) > 0
