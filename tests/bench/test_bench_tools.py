"""The benchmark's programs: statistics, rounds, command lines, pictures; never the times."""

from __future__ import annotations

import json
import os
import platform
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch

from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import machine, measure, nets, packages, profile, profiled, report, run, train
from bnorm_ext.bench.measure import Work, describe, percentile, sample, within_noise

GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def _as_it_was():
    """Threads, and the handler of SIGTERM, which the command lines set."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


# --- statistics -----------------------------------------------------------------------------------


def test_percentiles_lie_between_samples():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.1) == pytest.approx(1)
    assert percentile(list(range(101)), 0.9) == pytest.approx(90)
    assert percentile([7], 0.9) == 7


def test_halves_are_those_of_the_order_of_time():
    s = describe([1, 2, 3, 10, 20, 30])
    assert (s.first_half, s.second_half, s.drift, s.rounds) == (2, 20, 18, 6)
    assert s.median == 6.5
    assert describe([5]).drift == 0


def test_a_claim_is_noise_where_either_side_drifts_by_more():
    steady, faster = describe([100] * 10), describe([90] * 10)
    assert not within_noise(faster, steady)
    assert within_noise(describe([80] * 5 + [100] * 5), steady)
    assert within_noise(faster, describe([90] * 5 + [110] * 5))


# --- rounds ---------------------------------------------------------------------------------------


class FakeTimer:
    """Takes as long as the works' names say."""

    gaps, step = False, 1

    def __init__(self):
        self.asked, self.faults = [], {}

    def ready(self):
        return measure.contextlib.nullcontext()

    def rounds(self, works, count):
        self.asked.append(count)
        return [[float(w.name) for w in works]] * count


def test_rounds_are_bounded_from_below_and_above():
    works = [Work("3", int), Work("5", int)]
    timer = FakeTimer()
    found = sample(works, timer, seconds=1e-9).stats
    assert found["3"].rounds == found["5"].rounds == measure.MIN_ROUNDS
    assert sample(works, timer, seconds=-1).stats["3"].rounds == measure.HURRIED_ROUNDS
    assert (found["3"].median, found["5"].median) == (3, 5)
    assert timer.asked[0] == measure.WARM_UP
    assert sample(works, FakeTimer(), seconds=100).stats["3"].rounds == measure.MAX_ROUNDS


@pytest.mark.parametrize("cache", measure.CACHES)
def test_each_round_calls_each_work_once_prepared_and_keeps_the_result(cache):
    events, alive = [], []

    class Result:
        pass

    def work(name):
        def call():
            assert not any(ref() for ref in alive)  # of the call before
            events.append(name)
            result = Result()
            alive.append(weakref.ref(result))
            return result

        return Work(name, call, lambda: events.append("prepare"))

    timer = measure.CpuTimer(cache)
    times = timer.rounds([work("a"), work("b")], 4)
    assert [len(t) for t in times] == [2] * 4
    assert min(min(t) for t in times) > 0
    assert events[::2] == ["prepare"] * (len(events) // 2)
    each = 1 if cache == "cold" else 2  # warm: an untimed call before
    called = events[1::2]
    for i in range(4):
        assert sorted(called[2 * each * i : 2 * each * (i + 1)]) == ["a"] * each + ["b"] * each
    assert len(timer.faults["a"]) == 4


def test_the_order_within_rounds_changes_and_is_the_same_in_every_run():
    orders = [measure._order(3, i) for i in range(20)]
    assert len({tuple(o) for o in orders}) > 3
    assert orders == [measure._order(3, i) for i in range(20)]


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc can be told")
def test_large_outputs_are_fresh_in_a_cold_run_and_used_again_in_a_warm_one():
    """Whatever lies free in the heap."""
    machine.fresh_outputs(False)
    holes = [torch.ones(3 << 20) for _ in range(5)]
    del holes[::2]
    faults = {}
    x = torch.ones(2 << 20)  # 8 MB
    for cache in measure.CACHES:
        found = sample([Work("clone", x.clone)], measure.CpuTimer(cache), 0)
        faults[cache] = found.faults["clone"]
    machine.fresh_outputs(True)
    page = os.sysconf("SC_PAGE_SIZE")
    assert faults["warm"] < 50
    # Huge pages, where the system gives them unasked, are 2 MB each.
    assert faults["cold"] >= 3
    if "[always]" not in (machine._text("/sys/kernel/mm/transparent_hugepage/enabled") or ""):
        assert faults["cold"] >= x.nbytes / page


class FakeCuda:
    """A device on which each `call` of n takes n microseconds, and a host that takes its time."""

    def __init__(self, monkeypatch, queueing):
        self.now, self.host, self.queueing, self.slept = 0.0, 0.0, queueing, []
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                fake.host += fake.queueing
                self.at = fake.now = max(fake.now, fake.host)

            def query(self):
                return fake.host >= self.at

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        cuda = measure.torch.cuda
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "_sleep", self.sleep)
        monkeypatch.setattr(cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(
            cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20)
        )
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)

    def sleep(self, cycles):
        self.slept.append(cycles / 1e9)
        self.now = max(self.now, self.host) + cycles / 1e9

    def synchronize(self, device=None):
        self.host = self.now = max(self.now, self.host)

    def run(self, microseconds):
        return lambda: setattr(self, "now", self.now + microseconds * 1e-6)


@pytest.mark.parametrize("queueing", [1e-6, 1e-3])
def test_cuda_events_hold_no_gaps_between_launches(monkeypatch, queueing):
    fake = FakeCuda(monkeypatch, queueing)
    timer = measure.CudaTimer("warm", torch.device("cuda"))
    found = timer.rounds([Work("a", fake.run(30)), Work("b", fake.run(50))], 5)
    assert not timer.gaps
    for times in found:
        assert times == pytest.approx([30, 50], rel=1e-3)
    # A slow host makes the device sleep longer.
    assert (max(fake.slept[2:]) > 0.02) == (queueing == 1e-3)


def test_cuda_says_where_the_host_is_too_slow(monkeypatch):
    fake = FakeCuda(monkeypatch, queueing=0.1)
    timer = measure.CudaTimer("warm", torch.device("cuda"))
    timer.rounds([Work("a", fake.run(30))], 5)
    assert timer.gaps
    assert max(fake.slept) <= timer.LONGEST


# --- python -m bench ------------------------------------------------------------------------------


QUICKLY = ["--shape", "4,3,5,6", "--provider", "bnorm_ext,torch", "--time-budget", "0.01",
           "--device", "cpu"]  # fmt: skip


def test_a_run_prints_a_table_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "a.json"
    assert cli.main([*QUICKLY, "--cache", "both", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "4x3x5x6" in out
    assert "geometric mean" in out
    assert "[4/4] 4x3x5x6 float32 contiguous bn bwd: copy" in err  # plain lines, not on a terminal
    header, rows = report.read_json(file)
    assert len(rows) == 2 * 2 * 3
    for name in ("versions", "commit", "date", "command", "machine", "method", "threads"):
        assert header[name] is not None or name == "commit"
    assert header["command"].startswith("python -m bnorm_ext.bench --shape 4,3,5,6")
    assert header["providers"].keys() == set(packages.NAMES)
    assert header["interrupted"] is False
    for thing in ("warm-up", "L2", "clone", "float64", "thread", "sleep"):
        assert thing.replace("warm-up", "not counted") in header["method"]


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    whole = run.measure

    def interrupted(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    file = tmp_path / "a.json"
    assert cli.main([*QUICKLY, "--json", str(file)]) == 130
    header, rows = report.read_json(file)
    assert header["interrupted"] is True
    assert [r["pass"] for r in rows] == ["fwd"] * 3
    assert "interrupted" in capsys.readouterr().err


def test_compare_with_an_older_run_and_of_two_files(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert cli.main([*QUICKLY, "--json", files[0]]) == 0
    assert cli.main([*QUICKLY, "--json", files[1], "--compare", files[0]]) == 0
    first = capsys.readouterr().out
    assert "old / new" in first
    assert cli.main(["--compare", *files]) == 0
    again = capsys.readouterr().out
    assert "bnorm_ext: geometric mean" in again
    assert again.strip() in first


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suite",
    [["--suite", "resnet50", "--batch", "16"], ["--shape", "4,3,5,6", "8,3,5,6"]],
)
def test_plots_are_as_wide_as_a_slide_and_small_enough_for_git(tmp_path, suite, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plots are drawn with matplotlib")
    shrunk = nets.batch_norm_inputs

    def small(name, batch, size=224):
        return shrunk("resnet18", 2, 32)

    monkeypatch.setattr(nets, "batch_norm_inputs", small)
    file = tmp_path / "a.png"
    options = ["--time-budget", "0.01", "--provider", "bnorm_ext", "torch", "--device", "cpu"]
    assert cli.main([*suite, *options, "--dtype", "fp32,bf16", "--plot", str(file)]) == 0
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 1200
    assert len(content) < 150_000


# --- python -m bench.train and bench.profile ------------------------------------------------------


def tiny_net():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 1000),
    )  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--amp", "--channels-last"]])
def test_training_measures_each_variant(tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(nets, "build", lambda name: (tiny_net(), "this test"))
    file = tmp_path / "a.json"
    arguments = ["--batch", "2", "--size", "32", "--time-budget", "0.01", "--device", "cpu"]
    assert train.main([*arguments, *more, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "images/s" in out
    rows = json.loads(file.read_text())["rows"]
    assert [r["variant"] for r in rows] == ["native", "converted", "fused"]
    for r in rows:
        assert r["images_per_second"] == pytest.approx(2e6 / r["median_us"], rel=1e-2)
        assert 0 < r["batch_norm_share"] < 1
    assert rows[0]["ratio"] == 1


def test_the_share_counts_what_lies_within_a_batch_norm_once():
    def event(name, own, parent=None, device="CPU"):
        return SimpleNamespace(
            name=name, self_cpu_time_total=own, self_device_time_total=2 * own, cpu_parent=parent,
            device_type=f"DeviceType.{device}",
        )  # fmt: skip

    outer = event("aten::batch_norm", 1)
    inner = event("aten::native_batch_norm", 3, outer)
    events = [outer, inner, event("aten::empty", 1, inner), event("aten::conv2d", 15)]
    assert profiled.share_of(events, on_device=False) == pytest.approx(0.25)
    events.append(event("batch_norm_kernel", 100, device="CUDA"))
    assert profiled.share_of(events, on_device=True) == pytest.approx(0.25)


def test_peak_is_of_what_is_held_at_once():
    def event(when, change, name="[memory]"):
        return SimpleNamespace(start_ns=lambda: when, nbytes=lambda: change, name=lambda: name)

    events = [event(5, -6), event(3, 4), event(4, 6), event(6, 5), event(4, 99, "aten::add")]
    events += [event(1, 100), event(2, 0, "measured step")]
    assert profiled.peak_of(events) == 10


def test_peak_of_a_step_on_the_cpu():
    def step():
        one = torch.ones(1 << 20)
        two = one + 1
        del one
        return two * 2

    assert profiled.peak_bytes(step, torch.device("cpu")) == pytest.approx(8 << 20, rel=1e-3)


def test_profile_says_where_the_time_goes(monkeypatch, capsys):
    monkeypatch.setattr(profile, "times", lambda modules, *_, **__: [(2.0, 3.0)] * len(modules))
    assert profile.main(["--shape", "4,3,5,6", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "aten::native_batch_norm" in out
    assert "bnorm_ext::batch_norm_training" in out
    [line] = [x for x in out.splitlines() if x.startswith("forward   bnorm_ext")]
    assert line.split()[2:5] == ["2.0", "2.0", "0.0"]
