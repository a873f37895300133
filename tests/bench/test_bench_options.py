"""The benchmark programs' command lines: what cannot be is one line on stderr and exit code 2,
before anything is measured; what is odd but can be works."""

from __future__ import annotations

import sys

import pytest
import torch

from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import (
    cost_model,
    machine,
    measure,
    nets,
    options,
    packages,
    plots,
    profile,
    report,
    run,
    steps,
    train,
)
from tests.common.bench_programs import QUICKLY, refused

pytestmark = pytest.mark.usefixtures("process_as_it_was")


MANY = "9" * 400  # more than a float can hold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "slow"], "--suite: unknown 'slow'"),
        (["--suite", ""], "--suite: unknown ''"),
        (["--shape", "4"], "N,C"),
        (["--shape", "4,x"], "must be numbers"),
        (["--shape", ""], "must be numbers"),
        (["--shape", "4,0,3"], "positive"),
        (["--shape", "4,-3,-3"], "positive"),
        (["--shape", "1,8"], "one value per channel"),
        (["--shape", "4,3", "--layout", "channels_last"], "channels_last"),
        (["--shape", "100000,1000,1000"], "GB"),
        (["--shape", f"{2**62},1"], "GB"),
        (["--shape", f"{MANY},3"], "more elements than a tensor can have"),
        (["--shape", "2,3" + 70 * ",1"], "72 dimensions"),
        (["--shape", "4,3", "--suite", "1d"], "exclude"),
        (["--shape", "4,3", "--batch", "32"], "exclude"),
        (["--dtype", "int8"], "--dtype: unknown 'int8'"),
        (["--dtype", ""], "--dtype: names nothing"),
        (["--layout", ","], "--layout: names nothing"),
        (["--op", "conv"], "--op: unknown 'conv'"),
        (["--pass", "fwd,sideways"], "--pass: unknown 'sideways'"),
        (["--cache", "hot"], "--cache: unknown 'hot'"),
        (["--provider", "tensorflow"], "--provider: unknown 'tensorflow'"),
        (["--provider", ""], "--provider: names nothing"),
        (["--provider", "apex", "torch-nocudnn"], "apex is for cuda; torch-nocudnn is for cuda"),
        (["--batch", "15"], "--batch: at least 16"),
        (["--batch", "-1"], "--batch: at least 16"),
        (["--batch", "many"], "--batch: 'many' is no whole number"),
        (["--batch", str(2**40)], "GB"),
        (["--batch", str(2**62), "--suite", "resnet50"], "resnet50 cannot be trained on"),
        (["--batch", MANY], "--batch: at most"),
        (["--threads", "0"], "--threads: at least 1"),
        (["--threads", "-3"], "--threads: at least 1"),
        (["--threads", "two"], "--threads"),
        (["--threads", "1000000"], "--threads: at most"),
        (["--time-budget", "0"], "--time-budget: must be positive"),
        (["--time-budget", "-1"], "--time-budget: must be positive"),
        (["--time-budget", "nan"], "--time-budget: must be positive"),
        (["--time-budget", "inf"], "--time-budget: must be positive and at most 86400"),
        (["--time-budget", "soon"], "--time-budget: 'soon' is no number"),
        (["--device", "tpu"], "--device"),
        (["--device", "NVIDIA H100 80GB HBM3"], "--device"),
        (["--compare", "no-such-file.json"], "no-such-file.json"),
        (["--compare", "a", "b", "c"], "--compare: one file or two"),
        (["--compare", "a", "b", "--suite", "1d"], "excludes other options"),
        (["--suite", "1d", "--layout", "channels_last"], "no shape of this suite"),
        (["--no-such-option"], "--no-such-option"),
        (["resnet50"], "resnet50"),
    ],
)
def test_microbenchmarks(arguments, message, capsys):
    alone = {"--device", "--compare"} & set(arguments)
    assert message in refused(cli, arguments if alone else [*arguments, "--device", "cpu"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "twisted"], "--variant: unknown 'twisted'"),
        (["--variant", ""], "--variant: names nothing"),
        (["--model", "alexnet"], "--model"),
        (["--size", "8"], "--size: at least 32"),
        (["--size", "10000000"], "GB"),
        (["--size", str(2**60)], "cannot be trained on"),
        (["--batch", "0"], "--batch: at least 1"),
        # The last stage has one value per channel.
        (["--batch", "1", "--size", "32"], "resnet18 cannot be trained on 1 image of 32x32: "),
        (["--batch", str(10**9)], "GB"),
        (["--batch", str(10**9), "--inference"], "GB"),
        (["--size", str(2**60), "--inference"], "resnet18 cannot take 8 images"),
        (["--threads", "1000000"], "--threads: at most"),
        (["--time-budget", "0"], "--time-budget: must be positive"),
        (["--time-budget", "nan"], "--time-budget: must be positive"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_training(arguments, message, capsys):
    assert message in refused(train, [*arguments, "--device", "cpu"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,8"], "one value per channel"),
        (["--shape", ""], "must be numbers"),
        (["--shape", "2,3,1,1,1,4"], "2 to 5 dimensions"),
        (["--shape", "100000,1000,1000"], "GB"),
        (["--dtype", "int8"], "--dtype"),
        (["--layout", "sideways"], "--layout"),
        (["--layout", "channels_last", "--shape", "4,3"], "channels_last"),
        (["--provider", "jax"], "--provider: unknown 'jax'"),
        (["--provider", ""], "--provider: names nothing"),
        (["--threads", "0"], "--threads: at least 1"),
        (["--threads", "1000000"], "--threads: at most"),
    ],
)
def test_profile(arguments, message, capsys):
    assert message in refused(profile, [*arguments, "--device", "cpu"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "0"], "--bandwidth: must be positive"),
        (["--bandwidth", "-4e12"], "--bandwidth"),
        (["--bandwidth", "nan"], "--bandwidth: must be positive"),
        (["--bandwidth", "fast"], "--bandwidth: 'fast' is no number"),
        (["--device", "H900"], "unknown device 'H900'; known are"),
        (["--device", ""], "unknown device ''"),
        (["--net", "alexnet"], "--net: unknown 'alexnet'"),
        (["--batch", "0"], "--batch: at least 1"),
        (["--batch", str(2**62)], "cannot be trained on"),
        (["--dtype", "randn"], "--dtype: unknown 'randn'"),
        (["--layout", ""], "--layout: names nothing"),
    ],
)
def test_cost_model(arguments, message, capsys):
    given = [] if "--bandwidth" in arguments else ["--bandwidth", "4e12"]
    assert message in refused(cost_model, [*arguments, *given], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", [cli, train, profile])
def test_without_a_cuda_device(program, capsys):
    assert "there is no CUDA device" in refused(program, ["--device", "cuda"], capsys)


@pytest.mark.parametrize(
    "name", ["train", "profile", "sync", "cost_model", "cost-model", "compare", "plots", "numerics"]
)
def test_a_program_is_named_by_the_first_argument(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"], "bnorm-bench")
    assert ended.value.code == 0
    assert f"usage: bnorm-bench {name} " in capsys.readouterr().out


# --- what is odd and works ------------------------------------------------------------------------


def test_shapes_as_the_tables_have_them():
    assert options.shape_of("32x64x56x56") == options.shape_of("32,64,56,56") == (32, 64, 56, 56)


def test_memory_is_what_is_free_and_no_more_than_a_container_has(monkeypatch):
    cpu = torch.device("cpu")
    texts = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}
    monkeypatch.setattr(machine, "_text", texts.get)
    assert machine.free_bytes(cpu) == 4000 << 10
    texts["/sys/fs/cgroup/memory.max"] = "1000000"
    assert machine.free_bytes(cpu) == 1_000_000
    texts["/sys/fs/cgroup/memory.max"] = "max"
    assert machine.free_bytes(cpu) == 4000 << 10


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("png", b"\x89PNG"),
        ("PNG", b"\x89PNG"),
        ("svg", b"<?xml"),
        ("pdf", b"%PDF"),
        ("jpg", b"\xff\xd8"),
        ("webp", b"RIFF"),
    ],
)
def test_pictures_are_what_their_names_say(form, start, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plots are drawn with matplotlib")
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    file, json_file = tmp_path / f"a.{form}", tmp_path / "a.json"
    assert cli.main([*QUICKLY, "--plot", str(file), "--json", str(json_file)]) == 0
    starts = {
        "png": b"\x89PNG",
        "svg": b"<?xml",
        "pdf": b"%PDF",
        "jpg": b"\xff\xd8",
        "webp": b"RIFF",
    }
    first = file.read_bytes()
    assert first.startswith(starts[form.lower()])
    assert plots.main([str(json_file), str(file)]) == 0
    assert file.read_bytes().startswith(starts[form.lower()])


def test_some_of_the_named_providers_are_enough(capsys):
    assert cli.main([*QUICKLY[:2], "--provider", "apex,torch", *QUICKLY[4:]]) == 0
    assert "unavailable: apex: apex is for cpu" not in capsys.readouterr().out


def test_a_full_disk_ends_with_a_line_after_the_table(tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    assert cli.main([*QUICKLY, "--json", str(tmp_path / "a.json")]) == 1
    out, err = capsys.readouterr()
    assert "geometric mean" in out
    assert err.endswith("No space left on device\n")


def test_memory_that_runs_out_keeps_what_was_measured(monkeypatch, capsys):
    whole = run.measure

    def short(*arguments):
        yield next(whole(*arguments))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr(run, "measure", short)
    assert cli.main(QUICKLY) == 1
    out, err = capsys.readouterr()
    assert "out of memory" in err
    assert "geometric mean" in out


def test_a_variant_that_fails_has_a_reason_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(nets, "build", lambda name: (torch.nn.Conv2d(3, 4, 3), "this test"))

    def training_step(model, *_, **__):
        def fail():
            raise RuntimeError("no compiler\nat all")

        return fail if made.append(model) or len(made) == 1 else lambda: torch.ones(2) + 1

    made = []
    monkeypatch.setattr(steps, "training_step", training_step)
    monkeypatch.setattr(steps, "convert", lambda variant, model: model)
    arguments = ["--device", "cpu", "--batch", "2", "--size", "32", "--time-budget", "0.01"]
    assert train.main([*arguments, "--variant", "native,converted"]) == 0
    out = capsys.readouterr().out
    assert "native: RuntimeError: no compiler at all" in out
    assert "converted " in out
    made.clear()
    assert train.main([*arguments, "--variant", "native"]) == 1
    assert "native: RuntimeError: no compiler at all" in capsys.readouterr().out


def test_without_tqdm_the_progress_is_in_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(QUICKLY) == 0
    assert "[2/2] 4x3x5x6" in capsys.readouterr().err


def test_every_provider_can_be_drawn():
    pictures = pytest.importorskip("bnorm_ext.bench.pictures", exc_type=ImportError)
    assert set(packages.NAMES) == set(pictures.STYLES)
