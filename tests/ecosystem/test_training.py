"""Training as torch's own tools do it: mixed precision with a gradient scaler, averaged weights,
parametrisations, deterministic mode, inference mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnorm_ext
from tests.common.net_kinds import (
    EVERY,
    MODES,
    assert_kind,
    backward,
    close,
    images,
    make,
    native,
    pair,
)
from tests.common.twins import outcome

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- Mixed precision ----------------------------------------------------------------------------


def train_scaled(net, dtype, scaler, inputs):
    """Steps of SGD under autocast; the scale and the number of steps skipped."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    history = []
    for x in inputs:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before = net.fc.bias.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        history.append(
            (scaler.get_scale(), bool(norm.isfinite()), torch.equal(before, net.fc.bias))
        )
    return history


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@EVERY
def test_mixed_precision(kind, dtype):
    """The scaler goes through the same states, an overflow among them, and the parameters are as
    near to those of a float64 net as native's are, up to a factor of 2 and half a roundoff of the
    dtype: the steps are 0.05 long at most, 4 of them with gradients that are right to a few."""
    big = images(3).float()
    big[0, 0, 0, 0] = torch.inf
    inputs = [images(0).float(), images(1).float(), big, images(2).float(), images(4).float()]
    nets, histories = {}, {}
    for name in (kind, "native"):
        nets[name] = make(name, dtype=torch.float32)
        histories[name] = train_scaled(nets[name], dtype, scaler(2.0**10), inputs)
    assert histories[kind] == histories["native"]
    assert [skipped for *_, skipped in histories[kind]] == [False, False, True, False, False]
    assert [h[0] for h in histories[kind]] == [2.0**n for n in (10, 11, 10, 10, 11)]

    # The exact net takes the same steps, that which overflows but for the running statistics.
    exact = make("native", dtype=torch.float32).double()
    plain = torch.amp.GradScaler("cpu", enabled=False)
    train_scaled(exact, dtype, plain, [x.double() for x in inputs if x is not big])
    u = torch.finfo(dtype).eps / 2
    start = dict(native().named_parameters())
    right, ours, theirs = (
        {n: p.detach() for n, p in net.named_parameters()}
        for net in (exact, nets[kind], nets["native"])
    )
    for name, expected in right.items():
        scale = expected.abs().max()
        mine, other = ((p[name].double() - expected).abs().max() for p in (ours, theirs))
        assert mine <= 2 * other + u * scale / 2, (name, mine / scale / u, other / scale / u)
        assert mine < 0.2 * (expected - start[name]).abs().max(), name
    counts = [net.bn1.num_batches_tracked.item() for net in nets.values()]
    assert counts == [8, 8]


@EVERY
def test_scaler_and_autocast_around_float64(kind):
    """Which autocast leaves alone, so that the nets agree to rounding."""
    results = []
    for net in pair(kind):
        history = train_scaled(net, torch.bfloat16, scaler(2.0**10), [images(s) for s in range(4)])
        results.append((dict(net.state_dict()), history))
    assert results[0][1] == results[1][1]
    close(results[0][0], results[1][0])


# ---- Averaged weights ---------------------------------------------------------------------------


def train_averaged(net, average, update):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for seed in range(3):
        optimizer.zero_grad()
        net(images(seed)).square().mean().backward()
        optimizer.step()
        update(average, net)


@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
@EVERY
def test_averaged_model(kind, ema):
    results = []
    for net in pair(kind):
        options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True} if ema else {}
        average = AveragedModel(net, **options)
        train_averaged(net, average, lambda average, net: average.update_parameters(net))
        if ema:
            y = average.eval()(images(5))
        else:
            momenta = [m.momentum for m in average.modules() if isinstance(m, nn.BatchNorm2d)]
            update_bn([images(6), images(7), (images(8), "label")], average)
            again = [m.momentum for m in average.modules() if isinstance(m, nn.BatchNorm2d)]
            assert momenta == again == [0.1] * 3
            assert average.module.bn1.num_batches_tracked == 3
            y = average.eval()(images(5))
        results.append({"y": y, **average.state_dict(), **net.state_dict()})
    close(*results)


@EVERY
def test_update_bn_averages_over_the_batches(kind):
    net = make(kind)
    update_bn([images(seed) for seed in range(3)], net)
    inputs = [net.conv1(images(seed)) for seed in range(3)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    close((net.bn1.running_mean, net.bn1.running_var), (mean, var))


@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
@EVERY
def test_timm_averages(kind, name):
    cls = getattr(pytest.importorskip("timm.utils"), name)
    results = []
    for net in pair(kind):
        average = cls(net, decay=0.9)
        train_averaged(net, average, lambda average, net: average.update(net))
        averaged = average.ema if name == "ModelEma" else average.module
        results.append({"y": averaged.eval()(images(5)), **averaged.state_dict()})
    close(*results)


# ---- Parametrisations ---------------------------------------------------------------------------


class Positive(nn.Module):
    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.log()


def parametrised(net):
    parametrize.register_parametrization(net.bn2, "weight", Positive())
    nn.utils.parametrizations.spectral_norm(net.conv2)
    nn.utils.parametrizations.weight_norm(net.conv3)
    net.conv2.eval()  # spectral norm's own vectors stay as they are
    return net


@EVERY
def test_parametrised(kind):
    """Afterwards, and for converted and fused nets before as well."""
    expected = make("native")
    torch.manual_seed(1)
    right = backward(parametrised(expected), images())
    ours = make(kind)
    torch.manual_seed(1)
    close(backward(parametrised(ours), images()), right)
    if kind != "act":
        source = native()
        torch.manual_seed(1)
        if kind == "fused":  # whether with bn2, whose class is another now, is its own affair
            ours = bnorm_ext.fuse_batchnorm_act(parametrised(source))[0]
        else:
            with pytest.warns(UserWarning, match="ParametrizedBatchNorm2d: bn2"):
                ours = bnorm_ext.convert_batchnorm(parametrised(source))
        close(backward(ours, images()), right)
    parametrize.remove_parametrizations(ours.bn2, "weight")
    parametrize.remove_parametrizations(expected.bn2, "weight")
    close(ours(images()), expected(images()))


# ---- Modes --------------------------------------------------------------------------------------


@pytest.fixture
def _deterministic():
    """As for a run that must repeat; fresh memory is filled with NaN then."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@MODES
@EVERY
def test_deterministic_mode(kind, training, layout):
    x = images().contiguous(memory_format=layout)
    first, second = (backward(make(kind).train(training), x) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    close(first, backward(make("native").train(training), x))


@MODES
@EVERY
def test_inference_mode(kind, training):
    results = []
    for net in pair(kind, training):
        with torch.inference_mode():
            y = net(images())
            assert y.is_inference()
        results.append({"y": y, **dict(net.named_buffers())})
        backward(net, images())  # training goes on afterwards
        results[-1] |= {f"later {n}": b.clone() for n, b in net.named_buffers()}
    close(*results)
    assert_kind(net if kind == "native" else make(kind), kind)


@EVERY
def test_net_made_in_inference_mode(kind):
    """It can be evaluated there; training outside is the error that native raises, before
    anything has changed."""
    errors = []
    for name in (kind, "native"):
        with torch.inference_mode():
            net = make(name)
            close(net.eval()(images()), make("native").eval()(images()))
        net.train()
        before = {n: b.clone() for n, b in net.named_buffers()}
        errors.append(outcome(lambda net=net: net(images())))
        close(dict(net.named_buffers()), before)
    assert errors[0] is not None
    assert errors[0] == errors[1]
