"""The demo program: it runs, its numbers are those of the trainings, its plot is written."""

from __future__ import annotations

import copy
import importlib
import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnorm_ext.modules import BatchNorm2d

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")

FOLDER = Path(__file__).resolve().parents[2] / "demo"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine make these small nets crawl."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """As `python demo/digits.py` finds it: with its own folder first."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("digits")
    sys.path.remove(str(FOLDER))
    for name in ("digits", "show"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def show(digits):
    return sys.modules["show"]


@pytest.fixture(scope="module")
def runs(digits):
    return digits.train(epochs=2, seed=3, device=CPU)


def norm_types(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def operators(model) -> Counter[str]:
    """Those of one forward pass in training."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        copy.deepcopy(model).train()(torch.zeros(2, 1, 16, 16))
    return Counter(event.name for event in profiler.events())


def test_the_variants_are_what_their_names_say(runs):
    assert [run.name for run in runs] == ["torch.nn", "bnorm_ext", "bnorm_ext, fused"]
    native, converted, fused = (operators(run.model) for run in runs)
    assert norm_types(runs[0].model) == [nn.BatchNorm2d] * 17
    assert norm_types(runs[1].model) == [BatchNorm2d] * 17
    # Of the fused net's batch norms, 12 have taken a ReLU6 and 3 an addition.
    for found in (native, converted):
        assert found["aten::hardtanh_"] == 12
        assert found["aten::batch_norm"] == (17 if found is native else 0)
    assert fused["aten::hardtanh_"] == fused["aten::hardtanh"] == fused["aten::batch_norm"] == 0
    assert converted["aten::add"] - fused["aten::add"] == 3


def test_the_variants_start_from_the_same_weights(digits):
    states = [model.state_dict() for model in digits.variants(4, CPU).values()]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, states[0][name])
            assert tensor.data_ptr() != states[0][name].data_ptr(), "they would train each other"


def test_native_run_does_not_depend_on_the_others(digits, runs):
    """The same training written out alone gives the same losses, bit for bit: taking turns with
    the other runs, and timing, change nothing."""
    torch.manual_seed(3)
    model = digits.DigitNet()
    images, labels, _, _ = digits.digits(3, CPU)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = digits.steps_of(2)
    assert steps == 2 * (len(labels) // digits.BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    losses = []
    for batch in digits.batches(len(labels), 2, 3):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert runs[0].losses == losses
    assert {len(losses), steps} | {len(run.seconds) for run in runs} == {steps}


def test_every_order_of_the_variants_comes_equally_often(digits, monkeypatch):
    taken = []
    monkeypatch.setattr(digits.Run, "step", lambda self, *_: taken.append(self.name))
    monkeypatch.setattr(digits.Run, "evaluate", lambda *_: None)
    digits.train(epochs=3, seed=0, device=CPU)
    rounds = list(zip(*[iter(taken)] * 3, strict=True))
    assert len(rounds) == digits.steps_of(3) == 66
    assert {rounds.count(order) for order in set(rounds)} == {11}
    assert all(len(set(order)) == 3 for order in rounds)


def test_all_runs_start_alike_and_learn(runs):
    native = runs[0]
    for run in runs:
        # float32, u = 2**-24: a loss near 2.3 after a forward pass of about 40 roundings per value
        # is known to 40 * u * 2.3 = 6e-6. What follows may differ: one ReLU falls the other way.
        assert run.losses[0] == pytest.approx(native.losses[0], abs=6e-6)
        assert run.losses[-1] < 0.5 * run.losses[0]
        assert 0.3 < run.accuracy <= 1
        assert run.step_time > 0


def test_accuracy_is_that_of_the_model_in_evaluation_mode(digits, runs):
    _, _, images, labels = digits.digits(3, CPU)
    assert len(labels) == digits.TEST_SIZE
    pairs = list(zip(images, labels.tolist(), strict=True))
    for run in runs:
        model = copy.deepcopy(run.model).eval()
        with torch.no_grad():
            right = sum(int(model(x[None]).argmax()) == y for x, y in pairs)
        # One image at a time rounds differently, which may turn a draw between two classes.
        assert abs(right / len(labels) - run.accuracy) <= 1.5 / len(labels)


def test_split_has_every_image_once(digits):
    images, labels, test_images, test_labels = digits.digits(0, CPU)
    everything = torch.cat([images, test_images])
    assert everything.shape == (1797, 1, 16, 16)
    original = torch.from_numpy(digits.load_digits().images).float()[:, None] / 8 - 1
    larger = nn.functional.interpolate(original, size=16, mode="bilinear")
    assert sorted(everything.flatten(1).tolist()) == sorted(larger.flatten(1).tolist())
    assert torch.bincount(torch.cat([labels, test_labels])).min() > 100


# --- what is shown --------------------------------------------------------------------------------


def seeds(*figures):
    """Runs of each seed from (milliseconds, accuracy) of the three variants."""
    names = ("torch.nn", "bnorm_ext", "bnorm_ext, fused")
    return [
        [
            SimpleNamespace(name=name, step_time=ms / 1e3, accuracy=accuracy, losses=[2.5, 1.0])
            for name, (ms, accuracy) in zip(names, seed, strict=True)
        ]
        for seed in figures
    ]


FOUND = (
    ((10, 0.95), (8, 0.96), (5, 0.94)),
    ((12, 0.97), (8, 0.96), (4, 0.96)),
    ((11, 0.90), (10, 0.96), (10, 0.87)),
)


def test_table_shows_the_measured_numbers(show):
    """Median of times and of ratios by seed, mean of accuracies, smallest and largest of all."""
    _, _, native, converted, fused = show.table(seeds(*FOUND)).splitlines()
    assert re.split(r"  +", native) == [
        "torch.nn", "11.00 (10.00 to 12.00)", "94.00 (90.00 to 97.00)"
    ]  # fmt: skip
    assert re.split(r"  +", converted) == [
        "bnorm_ext", "8.00 (8.00 to 10.00)", "1.25 (1.10 to 1.50)", "96.00 (96.00 to 96.00)",
        "+2.00 (-1.00 to +6.00)",
    ]  # fmt: skip
    assert re.split(r"  +", fused) == [
        "bnorm_ext, fused", "5.00 (4.00 to 10.00)", "2.00 (1.10 to 3.00)",
        "92.33 (87.00 to 96.00)", "-1.67 (-3.00 to -1.00)",
    ]  # fmt: skip


def test_reading_says_what_is_chance(show):
    text = " ".join(show.reading(seeds(*FOUND), CPU).split())
    assert "over 3 seeds, time and ratio as median, accuracy as mean" in text
    assert "bnorm_ext: faster with every seed; accuracy higher with 2, lower with 1, " in text
    assert "moves by 7.00 points" in text
    # Three coins that all show the same side: 2 of 8.
    expected = "fused: faster with every seed; accuracy higher with 0, lower with 3, equal with 0, "
    assert expected + "as unevenly by chance in 25% of all cases" in text
    assert "as unevenly by chance in 100% of all cases" in text  # two to one is as even as can be
    assert show.kernel_path(CPU) in text


def test_reading_claims_no_more_than_was_seen(show):
    slower = ((10, 0.9), (11, 0.9), (9, 0.9))
    text = " ".join(show.reading(seeds(slower, (slower[0], slower[2], slower[1])), CPU).split())
    assert "bnorm_ext: faster with 1 of 2 seeds: no clear difference" in text
    assert "accuracy equal with every seed" in text
    text = " ".join(show.reading(seeds(slower), CPU).split())
    assert "bnorm_ext: slower; " in text
    assert "one seed says nothing about chance" in text


def test_reading_gives_the_largest_difference_of_the_first_losses(show):
    found = seeds(*FOUND)
    found[1][2].losses = [2.5 + 3e-4, 9.0]
    assert "differ by 3e-04 at most" in show.reading(found, CPU)


def test_plot_has_the_spread_and_every_curve(show, tmp_path):
    found = seeds(*FOUND)
    show.plot(found, CPU, tmp_path / "a.png")
    pixels = torch.from_numpy(show.plt.imread(tmp_path / "a.png"))[..., :3]
    assert min(pixels.shape[:2]) > 500
    for colour, _, _ in show.STYLES:
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        panels = ((pixels - rgb).abs().amax(-1) < 0.02).float().tensor_split(3, dim=1)
        assert all(panel.sum() > 100 for panel in panels), f"{colour} is missing in a panel"


# --- the command line -----------------------------------------------------------------------------


def test_command_line_writes_table_and_plot(digits, tmp_path, capsys):
    output = tmp_path / "new" / "curves.svg"
    given = ["--epochs", "1", "--seeds", "2", "--first-seed", "1", "--device", "cpu"]
    found = digits.main([*given, "--output", str(output)])
    out, err = capsys.readouterr()
    assert len(found) == 2
    assert found[0][0].losses != found[1][0].losses
    assert f"plot: {output.resolve()}" in out
    assert sys.modules["show"].table(found) in out
    assert "How to read it: over 2 seeds" in out
    assert "44/44" in err  # the progress bar
    assert output.read_text().startswith("<?xml")


@pytest.mark.parametrize(("budget", "begun"), [(250, 2), (500, 5), (1, 1)])
def test_no_seed_is_begun_that_the_time_budget_has_no_room_for(
    digits, tmp_path, monkeypatch, capsys, budget, begun
):
    """Each of the five takes a hundred seconds here."""
    clock = itertools.count(0, 100)
    monkeypatch.setattr(digits, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(digits, "train", lambda *_: seeds(FOUND[0])[0])
    given = ["--device", "cpu", "--output", str(tmp_path / "a.png")]
    assert len(digits.main([*given, "--time-budget", str(budget)])) == begun
    assert (f"{begun} of 5 seeds: " in capsys.readouterr().out) == (begun < 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: at least 1"),
        (["--seeds", "0"], "--seeds: at least 1"),
        (["--seeds", "nan"], "--seeds"),
        (["--first-seed", "-1"], "--first-seed: at least 0"),
        (["--threads", "1000000"], "--threads: at most"),
        (["--time-budget", "nan"], "--time-budget: must be positive"),
        (["--device", "tpu"], "--device"),
        (["--output", "."], "the name must end in .png"),
        (["--output", "curves.bmp"], "the name must end in .png"),
        (["--output", "/dev/null/curves.png"], "/dev/null"),
    ],
)
def test_odd_arguments_are_one_line_before_anything_is_trained(
    digits, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(digits, "train", None)
    with pytest.raises(SystemExit) as ended:
        digits.main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.count("\n") == 1
    assert message in err
