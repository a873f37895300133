"""Short CUDA calls, timed in a graph: on a GPU that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnorm_ext.bench import cases, clocks, graphs, machine, micro, packages, report, run
from bnorm_ext.bench.measure import Work, describe
from tests.common.fake_cuda import FakeCuda

pytestmark = pytest.mark.usefixtures("process_as_it_was")
CUDA = torch.device("cuda")


def known(**medians):
    return {name: describe([us] * 4) for name, us in medians.items()}


def test_the_time_of_a_call_is_its_share_of_a_graph(monkeypatch):
    """Also where a launch takes much longer than the call."""
    fake = FakeCuda(monkeypatch, queueing=50e-6)
    works = [Work("a", fake.run(3)), Work("b", fake.run(12))]
    found = graphs.sample_short(works, known(a=9.9, b=20), CUDA, 1)
    assert found.stats["a"].median == pytest.approx(3, rel=1e-3)
    assert found.stats["b"].median == pytest.approx(12, rel=1e-3)
    assert found.stats["a"].p90 == pytest.approx(3, rel=1e-3)
    assert found.reasons == {}


def test_calls_that_take_longer_are_not_captured(monkeypatch):
    fake = FakeCuda(monkeypatch, queueing=1e-6)
    works = [Work("a", fake.run(10))]
    assert graphs.sample_short(works, known(a=10), CUDA, 1) == graphs.Graphed()
    assert graphs.sample_short(works, known(a=5), torch.device("cpu"), 1) == graphs.Graphed()
    assert fake.captured == []


def test_what_cannot_be_captured_has_a_reason_and_the_others_have_times(monkeypatch):
    fake = FakeCuda(monkeypatch, queueing=1e-6)

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    works = [
        Work("waits", waits),
        Work("in place", fake.run(2), repeats=False),
        Work("ours", fake.run(2)),
    ]
    found = graphs.sample_short(works, known(ours=2), CUDA, 1)
    assert list(found.stats) == ["ours"]
    assert found.reasons == {
        "waits": "RuntimeError: operation not permitted when stream is capturing",
        "in place": "overwrites its input",
    }
    assert graphs.sample_short(works[:2], known(ours=2), CUDA, 1).stats == {}


class Costs(TorchDispatchMode):
    """Every operation takes a microsecond of the fake GPU."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.streams = fake, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.fake.run(1)()
        self.streams.add(self.fake.current_stream())
        return op(*args, **(kwargs or {}))


def test_walk_from_the_cases_to_table_and_json(monkeypatch, tmp_path):
    """All that `python -m bench --device cuda --cache warm` does for a short case but the GPU."""
    fake = FakeCuda(monkeypatch, queueing=1e-6)
    gated, costs = run._gated, Costs(fake)
    monkeypatch.setattr(
        run, "_gated", lambda members, p, device: gated(members, p, torch.device("cpu"))
    )
    monkeypatch.setattr(machine, "device_name", lambda device: "a GPU that is not there")
    chosen = packages.make(["bnorm_ext", "torch"])
    planned = [cases.Case((4, 3, 2, 2), pass_=p) for p in ("fwd", "bwd", "eval")]
    rows = []
    with costs:
        for _, found in run.measure(planned, chosen, CUDA, ["warm"], 0.01):
            rows += found
    assert len(rows) == 9
    assert len(fake.captured) == 9
    # Backward runs on the stream on which forward was recorded: that of the graphs of a case.
    assert fake.default not in fake.captured
    assert [len(set(fake.captured[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert costs.streams == {fake.default, *fake.captured}
    for row in rows:
        assert row["graph_reason"] is None
        assert row["graph_us"] > 0
        assert row["graph_us"] == pytest.approx(row["median_us"], rel=0.01)
        assert (row["graph_ratio"] is None) == (row["provider"] == "copy")
    lines = report.table(rows).splitlines()
    assert "bnorm_ext, graph us" in lines[0]
    assert lines[0].endswith("graph ratio")
    assert any(line.startswith("graph us: ") and "warm" in line for line in lines)
    header = {"versions": {}, "method": micro.METHOD}
    report.write_json(tmp_path / "a.json", header, rows)
    assert report.read_json(tmp_path / "a.json") == (header, json.loads(json.dumps(rows)))
    assert "warm, in a graph" in header["method"]


def test_a_cpu_has_neither_a_stream_nor_a_column(monkeypatch):
    with graphs.own_stream(torch.device("cpu")):
        pass
    chosen = packages.make(["bnorm_ext", "torch"])
    [(_, rows)] = run.measure(
        [cases.Case((4, 3, 2, 2))], chosen, torch.device("cpu"), ["warm"], 0.01
    )
    assert all(row["graph_us"] is None and row["graph_reason"] is None for row in rows)
    assert "graph" not in report.table(rows)


def test_the_clocks_of_a_run_are_said_and_written(monkeypatch):
    class Sampled:
        def __init__(self):
            self.samples = 0

        def sample(self):
            self.samples += 1

        def summary(self):
            return {
                "samples": 8,
                "sm_mhz": [1200, 1755, 1980],
                "memory_mhz": [2619, 2619, 2619],
                "throttled": {"power cap": 0.25},
            }

    sampled = Sampled()
    monkeypatch.setattr(clocks, "clocks_of", lambda device: sampled)
    monkeypatch.setattr(clocks, "EVERY", 0.001)
    header = {"machine": {"gpu": {}}}
    clocks.record(header, CUDA)
    assert header["machine"]["gpu"]["clocks"] == sampled.summary()
    assert clocks.sentence(header) == (
        "clocks while measuring: SM 1755 MHz (1200 to 1980), memory 2619 MHz (2619 to 2619); "
        "lowered by power cap in 25 % of 8 samples"
    )
    assert clocks.sentence({"machine": {}}) == ""
    with clocks.sampling(CUDA):
        while sampled.samples < 3:
            pass
    monkeypatch.setattr(clocks, "clocks_of", lambda device: None)
    clocks.record({"machine": {}}, CUDA)
    with clocks.sampling(CUDA):
        pass
