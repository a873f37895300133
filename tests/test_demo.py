"""The demo program: it runs, its numbers are those of the two trainings, its plot is written."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bnorm_ext.modules import BatchNorm2d

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")

SCRIPT = Path(__file__).parent.parent / "demo" / "digits.py"
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
    spec = importlib.util.spec_from_file_location("demo_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def runs(digits):
    return digits.train(epochs=2, seed=3, device=CPU, progress=False)


def norm_types(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_one_run_is_native_and_one_is_converted(runs):
    native, ours = runs
    assert norm_types(native.model) == [nn.BatchNorm2d] * 8
    assert norm_types(ours.model) == [BatchNorm2d] * 8


def test_native_run_does_not_depend_on_the_other(digits, runs):
    """The same training written out alone gives the same losses, bit for bit: taking turns with
    the other run, and timing, change nothing."""
    torch.manual_seed(3)
    model = digits.DigitNet()
    images, labels, _, _ = digits.digits(3, CPU)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = 2 * (len(labels) // digits.BATCH_SIZE)
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
    assert len(losses) == steps == len(runs[0].seconds) == len(runs[1].seconds)


def test_both_runs_start_alike_and_learn(digits, runs):
    native, ours = runs
    # float32, u = 2**-24: a loss near 2.3 after a forward pass of about 20 roundings per value is
    # known to 20 * u * 2.3 = 3e-6. After that one ReLU may fall the other way, which moves the loss
    # by about 1e-3; a wrong gradient or statistic moves it by tenths.
    assert ours.losses[0] == pytest.approx(native.losses[0], abs=3e-6)
    assert 0 <= digits.largest_difference(runs) < 2e-2
    for run in runs:
        assert run.losses[-1] < 0.5 * run.losses[0]
        assert 0.8 < run.accuracy <= 1
        assert 0 < run.step_time < 10


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
    everything = torch.cat([images, test_images]).flatten(1)
    reference = torch.from_numpy(digits.load_digits().data).float() / 8 - 1
    assert len(everything) == len(reference) == 1797
    assert sorted(everything.tolist()) == sorted(reference.tolist())
    assert torch.bincount(torch.cat([labels, test_labels])).min() > 100


def test_largest_difference_looks_at_the_first_steps_only(digits, runs):
    native, ours = (copy.copy(run) for run in runs)
    native.losses = [1.0] * 30
    ours.losses = [1.0, 1.25] + [1.125] * 8 + [5.0] * 20
    assert digits.largest_difference([native, ours]) == 0.25


def test_table_shows_the_measured_numbers(digits, runs):
    native, ours = (copy.copy(run) for run in runs)
    native.seconds, ours.seconds = [9.0] * 5 + [0.004] * 9, [9.0] * 5 + [0.002] * 9
    native.accuracy, ours.accuracy = 0.975, 0.9875
    lines = digits.table([native, ours], CPU).splitlines()
    for label, *cells in (
        ("device", "cpu"),
        ("kernel path", "torch", digits.kernel_path(CPU)),
        ("step time (median)", "4.00 ms", "2.00 ms"),
        ("step time, torch.nn / bnorm_ext", "2.00"),
        ("test accuracy (360 images)", "97.50%", "98.75%"),
        ("largest loss difference, 10 steps", f"{digits.largest_difference(runs):.1e}"),
    ):
        line = next(line for line in lines if line.startswith(label))
        rest = line.removeprefix(label)
        assert all(cell in rest for cell in cells), line


def test_command_line_writes_table_and_plot(digits, tmp_path, capsys):
    output = tmp_path / "new" / "curves.png"
    digits.main(["--epochs", "1", "--seed", "1", "--device", "cpu", "--output", str(output)])
    printed = capsys.readouterr()
    assert f"loss curves: {output.resolve()}" in printed.out
    assert "test accuracy" in printed.out
    assert "training both" in printed.err  # the progress bar
    pixels = digits.plt.imread(output)
    assert min(pixels.shape[:2]) > 500
    for colour in (digits.ORANGE, digits.BLUE):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        distance = (torch.from_numpy(pixels[..., :3]) - rgb).abs().amax(-1)
        assert (distance < 0.02).sum() > 100, "a curve is missing"


def test_epochs_must_be_positive(digits, capsys):
    with pytest.raises(SystemExit):
        digits.main(["--epochs", "0"])
    assert "--epochs must be at least 1" in capsys.readouterr().err
