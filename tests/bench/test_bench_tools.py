"""The benchmark's programs run: microbenchmarks, pictures, training, profile; never the times."""

from __future__ import annotations

import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import nets, packages, processes, profile, profiled, report, run, steps, train
from tests.common.bench_programs import QUICKLY

pytestmark = pytest.mark.usefixtures("process_as_it_was")


# --- python -m bench ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "more", [[], ["--amp", "--channels-last"], ["--amp", "float16"], ["--amp", "bfloat16"]]
)
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
        assert r["batch_norm_us"] > 0
        assert r["faults_per_step"] >= 0
        assert r["faults_per_profiled_step"] >= 0
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize("more", [[], ["--amp"], ["--channels-last"]])
def test_inference_is_forward_alone_in_evaluation_mode(tmp_path, monkeypatch, more):
    """With one image, which a batch norm of one value per channel could not be trained on."""
    calls = []

    def see(module, args, kwargs, output):
        modes = module.training, torch.is_inference_mode_enabled(), output.requires_grad
        calls.append((type(module).__name__, *modes, output.dtype))

    def build(name):
        net = tiny_net()
        net[1].register_forward_hook(see, with_kwargs=True)
        return net, "this test"

    monkeypatch.setattr(nets, "build", build)
    file = tmp_path / "a.json"
    arguments = ["--batch", "1", "--size", "32", "--time-budget", "0.01", "--device", "cpu"]
    chosen = ["--variant", "native,converted", "--inference", "--json", str(file)]
    assert train.main([*arguments, *chosen, *more]) == 0
    dtype = torch.bfloat16 if "--amp" in more else torch.float32
    assert {call[1:] for call in calls} == {(False, True, False, dtype)}
    assert [call[0] for call in calls].count("BatchNorm2d") == len(calls)
    written = json.loads(file.read_text())
    assert written["header"]["inference"]
    for row in written["rows"]:
        assert 0 < row["batch_norm_share"] < 1


def test_each_process_measures_what_was_asked_for(monkeypatch):
    passed = []

    def one(variant, arguments):
        passed.append(arguments)
        return {"variant": variant, "reason": "not run"}

    monkeypatch.setattr(processes, "_one", one)
    what = ["--model", "densenet121", "--batch", "1", "--size", "32", "--inference"]
    how = ["--channels-last", "--amp", "bfloat16", "--compile", "--threads", "1", "--device", "cpu"]
    assert train.main([*what, *how, "--processes", "1", "--variant", "fused"]) == 1
    o = train.parser("train").parse_args(passed[0])
    assert (o.device, o.batch, o.size, o.inference, o.channels_last) == ("cpu", 1, 32, True, True)
    assert (o.amp, o.compile, o.threads, o.model) == ("bfloat16", "default", 1, "densenet121")


def test_profiled_steps_come_after_the_timed_ones(monkeypatch):
    # The first steps of a process take fresh memory: their page faults would count as batch norm's.
    order = []

    def note(what, result=None):
        return lambda *_: order.append(what) or result

    monkeypatch.setattr(nets, "build", lambda name: (tiny_net(), "this test"))
    monkeypatch.setattr(steps, "training_step", lambda *_, **__: note("step"))
    monkeypatch.setattr(train, "times", note("profiled", profiled.Own(1.0, 2.0, 0.0)))
    monkeypatch.setattr(train, "peak_bytes", note("peak", 1))
    arguments = ["--batch", "2", "--size", "32", "--time-budget", "0.01", "--device", "cpu"]
    assert train.main([*arguments, "--variant", "native"]) == 0
    assert order[-2:] == ["profiled", "peak"]
    assert len(order) >= train.WARM_UP + train.MIN_STEPS + 2
    assert set(order[:-2]) == {"step"}


@pytest.mark.parametrize(
    ("more", "amp", "mode"),
    [
        ([], None, None),
        (["--amp", "--compile"], torch.bfloat16, "default"),
        (["--amp", "float16", "--compile", "reduce-overhead"], torch.float16, "reduce-overhead"),
    ],
)
def test_a_step_is_made_as_asked(monkeypatch, more, amp, mode):
    asked = []

    def training_step(model, *_, **how):
        asked.append(how)
        return lambda: None

    monkeypatch.setattr(nets, "build", lambda name: (tiny_net(), "this test"))

    def times(*_):
        # A compiled net has no operators of batch norm, and does not run while operators are timed.
        assert mode is None
        return profiled.Own(1.0, 2.0, 0.0)

    monkeypatch.setattr(steps, "training_step", training_step)
    monkeypatch.setattr(train, "times", times)
    arguments = ["--batch", "2", "--size", "32", "--time-budget", "0.01", "--device", "cpu"]
    assert train.main([*arguments, *more]) == 0
    assert asked == [{"amp": amp, "mode": mode}] * 3


def test_processes_alternate_and_are_compared_by_round(tmp_path, monkeypatch, capsys):
    # Each process is slower than the one before, as on a machine that gets busier.
    order = []

    def one(variant, arguments):
        order.append(variant)
        if variant == "fused":
            return {"variant": variant, "reason": "there is nothing to fuse in this model"}
        step = (2 if variant == "native" else 1) * 1000.0 * len(order)
        own = {"batch_norm_us": step / 4, "batch_norm_share": 0.25}
        return {"variant": variant, "reason": None, "median_us": step, "faults_per_step": 7,
                "faults_per_profiled_step": 8, "peak_bytes": None, **own}  # fmt: skip

    monkeypatch.setattr(processes, "_one", one)
    file = tmp_path / "a.json"
    arguments = ["--batch", "2", "--size", "32", "--device", "cpu", "--processes", "2"]
    assert train.main([*arguments, "--json", str(file)]) == 0
    assert order == ["native", "converted", "fused", "fused", "converted", "native"]
    written = json.loads(file.read_text())
    native, converted, fused = written["rows"]
    # Steps of 2 and 12 ms against 2 and 5 ms.
    assert (native["median_us"], converted["median_us"]) == (7000, 3500)
    assert (
        converted["ratio"] == converted["batch_norm_ratio"] == pytest.approx((2 / 2 + 12 / 5) / 2)
    )
    assert converted["ratio_quartiles"] == [pytest.approx(1.35), pytest.approx(2.05)]
    assert fused["reason"] == "there is nothing to fuse in this model"
    assert [set(r) for r in written["header"]["rounds"]] == [{"native", "converted", "fused"}] * 2
    out = capsys.readouterr().out
    assert "fused: there is nothing to fuse" in out
    assert "1.700" in out


def test_a_process_that_ends_early_has_its_last_line_as_reason(capfd):
    row = processes._one("native", ["--model", "resnet18", "--batch", "1", "--size", "32"])
    assert "resnet18 cannot be trained on 1 image" in row["reason"]


def test_an_interruption_keeps_the_rounds_before(monkeypatch, capsys):
    def one(variant, arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(variant)
        return {"variant": variant, "reason": None, "median_us": 1000.0, "faults_per_step": 0,
                "faults_per_profiled_step": 0, "peak_bytes": 1,
                "batch_norm_us": 1.0, "batch_norm_share": 0.1}  # fmt: skip

    done = []
    monkeypatch.setattr(processes, "_one", one)
    arguments = ["--batch", "2", "--size", "32", "--device", "cpu", "--processes", "2"]
    assert train.main([*arguments, "--variant", "native,converted"]) == 130
    assert "converted" in capsys.readouterr().out


def test_the_share_counts_what_lies_within_a_batch_norm_once():
    def event(name, own, parent=None, device="CPU"):
        return SimpleNamespace(
            name=name, self_cpu_time_total=own, self_device_time_total=2 * own, cpu_parent=parent,
            device_type=f"DeviceType.{device}",
        )  # fmt: skip

    outer = event("aten::batch_norm", 1)
    inner = event("aten::native_batch_norm", 3, outer)
    events = [outer, inner, event("aten::empty", 1, inner), event("aten::conv2d", 15)]
    events.append(event("batch_norm_kernel", 100, device="CUDA"))
    assert profiled.times_of(events) == (10, 40)


def test_own_time_on_the_cpu_is_that_of_batch_norms_operators(monkeypatch):
    # Each operator takes a second: forward and backward of one batch norm, of one ReLU and the sum.
    clock = itertools.count()
    monkeypatch.setattr(profiled.time, "perf_counter", lambda: float(next(clock)))
    x = torch.randn(4, 3, 5, requires_grad=True)
    for name in ("native", "converted"):
        layer = steps.convert(name, torch.nn.BatchNorm1d(3, track_running_stats=False))
        with profiled._Timer() as timer:
            layer(x).relu().sum().backward()
        assert timer.batch_norm_us == 2e6
        assert timer.all_us >= 5e6


def test_own_time_is_a_median_of_steps(monkeypatch):
    slow_once = iter([(900.0, 1000.0), (5.0, 20.0), (4.0, 30.0), (6.0, 10.0), (5.0, 20.0)])

    def timer():
        mine, everything = next(slow_once)
        return contextlib.nullcontext(SimpleNamespace(batch_norm_us=mine, all_us=everything))

    monkeypatch.setattr(profiled, "_Timer", timer)
    assert profiled.times(lambda: None, torch.device("cpu"))[:2] == (5, 20)


def test_page_faults_of_profiled_steps_are_counted():
    held = []

    def step():
        held.append(bytearray(64 << 20))  # fresh memory each time

    assert profiled.times(step, torch.device("cpu")).faults >= 32  # also in huge pages


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
