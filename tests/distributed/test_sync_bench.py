"""bench.sync and the formula of what is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import bnorm_ext
from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import nets, sync, traffic
from tests.common.ranks import ranks

ROOT = Path(bnorm_ext.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """Started as users start it, with tiny settings."""
    file = tmp_path / "sync.json"
    arguments = ["--device", "cpu", "--shape", "2x4x3x3", "--batch", "2", "--size", "32"]
    arguments += ["--time-budget", "0.1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "bnorm_ext.bench", "sync", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["header"]["processes"] == 2
    rows = content["rows"]
    assert [(r["what"], r["variant"]) for r in rows] == [
        ("call", "local"),
        ("call", "synchronised"),
        ("step", "native"),
        ("step", "converted"),
        ("step", "synchronised"),
        ("step", "synchronised, fused"),
    ]
    for r in rows:
        assert r["variant"] in done.stdout
        assert r["p10_us"] <= r["median_us"] <= r["p90_us"]
        assert (r["bytes"], r["messages"]) == (r["formula_bytes"], r["formula_messages"])
        assert r["layers"] == (
            0 if "sync" not in r["variant"] else 1 if r["what"] == "call" else 20
        )
        assert (r["messages"] > 0) == (r["layers"] > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "--processes: at least 2"),
        (["--processes", "two"], "--processes: 'two' is no whole number"),
        (["--processes", "1000"], "--processes: at most 64"),
        (["--shape", "2,3"], "--shape 2,3: must be four positive numbers"),
        (["--shape", "2,0,3,3"], "--shape 2,0,3,3: must be four positive numbers"),
        (["--shape", "1,4,1,1"], "one value per channel"),
        (["--shape", "x"], "--shape 'x': must be numbers"),
        (["--shape", "1000000,1000000,100,100"], "GB are free"),
        (["--size", "8"], "--size: at least 32"),
        (["--time-budget", "0"], "--time-budget: must be positive"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: there is no folder"),
        (["--model", "alexnet"], "--model"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        sync.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are CUDA devices")
def test_without_enough_devices(capsys) -> None:
    with pytest.raises(SystemExit):
        sync.main(["--device", "cuda"])
    assert "CUDA device" in capsys.readouterr().err


def test_a_process_that_fails(monkeypatch, capsys) -> None:
    def fails(plan):
        raise RuntimeError("-- Process 1 terminated with the following error:\nBroken pipe")

    monkeypatch.setattr(sync, "measure", fails)
    assert sync.main(["--device", "cpu", "--shape", "2x4x3x3"]) == 1
    assert "a process failed: Broken pipe\n" in capsys.readouterr().err


# --- traffic --------------------------------------------------------------------------------------


def test_traffic(tmp_path: Path, capsys) -> None:
    file = tmp_path / "traffic.json"
    assert cli.main(["sync", "--traffic", "--json", str(file)], "bnorm-bench") == 0
    printed = capsys.readouterr().out
    assert "53 batch norms" in printed
    rows = json.loads(file.read_text())["rows"]
    assert [r["ranks"] for r in rows[::2]] == list(traffic.WORLDS)
    channels = traffic.channels_of("resnet50")
    for r in rows:
        sends = traffic.ours if r["variant"] == "synchronised" else traffic.torchs
        assert (r["bytes"], r["messages"]) == sends(r["ranks"], channels)


def test_channels_are_those_of_the_net() -> None:
    net = nets.NETS["resnet50"]()
    found = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(traffic.channels_of("resnet50")) == sorted(found)
    assert (len(found), sum(found)) == (53, 26_560)


def torchs_collectives(rank: int, empty: bool) -> list[list[int]]:
    """What torch's function calls, with stand-ins for its CUDA operators' results."""
    from torch.nn.modules._functions import SyncBatchNorm as Function

    C = 5
    x = torch.randn(0 if empty and rank else 4, C, 3, requires_grad=True)
    group = dist.group.WORLD
    given = {n: getattr(torch, n) for n in OPERATORS}
    for name in OPERATORS:
        setattr(torch, name, globals()[name])
    try:
        with traffic.counted() as forward:
            y = Function.apply(x, torch.ones(C), None, None, None, 1e-5, 0.1, group, 2)
        with traffic.counted() as backward:
            y.sum().backward()
    finally:
        for name, operator in given.items():
            setattr(torch, name, operator)
    return [forward, backward]


def batch_norm_stats(x, eps):
    return torch.zeros(x.size(1)), torch.ones(x.size(1))


def batch_norm_gather_stats_with_counts(x, mean, *_):
    return mean[0], torch.ones_like(mean[0])


def batch_norm_elemt(x, *_):
    return x.clone()


def batch_norm_backward_reduce(dy, x, mean, *_):
    return (torch.zeros_like(mean),) * 4


def batch_norm_backward_elemt(dy, *_):
    return dy


OPERATORS = (
    "batch_norm_stats",
    "batch_norm_gather_stats_with_counts",
    "batch_norm_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_backward_elemt",
)


@pytest.mark.parametrize("empty", [False, True])
def test_torchs_formula_is_what_torchs_code_sends(tmp_path: Path, empty: bool) -> None:
    with ranks(2, tmp_path) as group:
        for forward, backward in group(torchs_collectives, empty):
            expected = traffic.torchs(2, [5])
            assert sum(forward) + sum(backward) == expected.sent_bytes
            assert len(forward) + len(backward) == expected.messages


def resnets_step(rank: int) -> list[int]:
    net = bnorm_ext.convert_batchnorm(nets.NETS["resnet50"](), sync=True)
    x = torch.randn(2, 3, 32, 32)
    net(x)  # the ranks agree
    with traffic.counted() as found:
        F.cross_entropy(net(x), torch.zeros(2, dtype=torch.int64)).backward()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_resnet50_sends_what_the_formula_says(world: int, tmp_path: Path) -> None:
    expected = traffic.ours(world, traffic.channels_of("resnet50"))
    with ranks(world, tmp_path) as group:
        for found in group(resnets_step):
            assert (sum(found), len(found)) == expected
