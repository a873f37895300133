"""The modules under the rest of torch: TorchScript, compile, export, reparametrisation,
pruning, synchronised batch norm."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bnorm_ext.convert import convert_batchnorm
from tests.common.nets import NETS, SmallResNet
from tests.common.twins import FLOAT64, NO_BIAS, OURS, SHAPES, assert_same, outcome, step, twins

# TorchScript is deprecated, and still what some models are shipped in.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")


def batch(seed=0, shape=SHAPES[2]):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def net_twins(name="resnet"):
    torch.manual_seed(0)
    native = NETS[name]().double()
    return convert_batchnorm(copy.deepcopy(native)), native


SCRIPT_CONFIGS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    *NO_BIAS,
]


@pytest.mark.parametrize("kwargs", SCRIPT_CONFIGS)
def test_torchscript_matches_native_and_leaves_the_module(kwargs):
    ours, native = twins(2, **kwargs)
    net = nn.Sequential(ours)
    scripted = torch.jit.script(net)
    assert net[0] is ours
    assert type(ours) is OURS[2]
    x, dy = batch()
    for training in (True, False):
        scripted.train(training), native.train(training)
        seen = {name.replace("0.", ""): value for name, value in step(scripted, x, dy).items()}
        assert_same(seen, step(native, x, dy))


def test_torchscript_of_one_whose_tracking_was_turned_off():
    ours, native = twins(2)
    ours.track_running_stats = native.track_running_stats = False
    scripted, scripted_native = torch.jit.script(ours), torch.jit.script(native)
    x, dy = batch()
    for training in (True, False):
        scripted.train(training), scripted_native.train(training)
        assert_same(step(scripted, x, dy), step(scripted_native, x, dy))


def test_torchscript_shares_tensors_and_needs_no_extension_in_its_file():
    ours, _ = twins(2)
    scripted = torch.jit.script(ours)
    x, _ = batch()
    y = scripted(x)
    assert ours.num_batches_tracked.item() == 1
    assert scripted.weight.data_ptr() == ours.weight.data_ptr()
    assert "bnorm_ext::" not in str(scripted.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), y, **FLOAT64)
    assert outcome(lambda: scripted(x[0])) is not None


@pytest.mark.parametrize("name", NETS)
def test_torchscript_of_a_net(name):
    ours, native = net_twins(name)
    scripted = torch.jit.script(ours)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(scripted(x), native(x), **FLOAT64)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training, momentum):
    """``fullgraph=True`` refuses a graph break, so the counter is never read on the host."""
    torch._dynamo.reset()
    ours, native = twins(2, momentum=momentum)
    ours.train(training), native.train(training)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, dy = batch()
    for _ in range(2):
        seen = step(compiled, x, dy)
        assert_same({k.replace("_orig_mod.", ""): v for k, v in seen.items()}, step(native, x, dy))


def test_compiled_net_follows_train_and_eval():
    torch._dynamo.reset()
    ours, native = net_twins()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    for training in (True, False, True):
        ours.train(training), native.train(training)
        torch.testing.assert_close(compiled(x), native(x), **FLOAT64)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    ours, native = net_twins()
    ours.train(training), native.train(training)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), native(x), **FLOAT64)


def test_functional_call_uses_the_given_tensors():
    ours, native = twins(2)
    swapped = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    swapped["weight"] = torch.full((5,), 3.0, dtype=torch.float64)
    swapped_native = {name: tensor.clone() for name, tensor in swapped.items()}
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    x, _ = batch()
    y = torch.func.functional_call(ours, swapped, x)
    torch.testing.assert_close(y, torch.func.functional_call(native, swapped_native, x), **FLOAT64)
    assert_same(swapped, swapped_native)
    assert_same(dict(ours.state_dict()), before)


def reparametrised(module):
    class Positive(nn.Module):
        def forward(self, w):
            return w.exp()

    parametrize.register_parametrization(module, "weight", Positive())


def pruned(module):
    prune.random_unstructured(module, "weight", 0)  # amount 0: the mechanism without the chance


def weight_normed(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, "weight", dim=None)


def plain_tensors(module):
    for name, tensor in module.state_dict().items():
        delattr(module, name)
        setattr(module, name, tensor.clone() + 1)


@pytest.mark.parametrize("change", [reparametrised, pruned, weight_normed, plain_tensors])
def test_weights_that_are_no_longer_parameters(change):
    ours, native = twins(2)
    change(ours), change(native)
    x, dy = batch()
    for training in (True, False):
        ours.train(training), native.train(training)
        assert_same(step(ours, x, dy), step(native, x, dy))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours, name), getattr(native, name), **FLOAT64)


def test_sync_batchnorm_conversion_still_works():
    ours, native = net_twins()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    kinds = {type(m) for m in sync.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(sync(x), native(x), **FLOAT64)


def test_conv_bn_folding_for_inference():
    ours, native = net_twins()
    ours.eval(), native.eval()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    folded = nn.utils.fuse_conv_bn_eval(ours.stem[0], ours.stem[1])
    torch.testing.assert_close(folded(x), native.stem[:2](x), **FLOAT64)


def test_data_parallel_style_replica():
    """``nn.DataParallel`` makes replicas whose parameters are plain attributes."""
    ours, native = twins(2)
    replica = ours._replicate_for_data_parallel()
    for name, tensor in ours.named_parameters():
        setattr(replica, name, tensor.detach() * 1)
    for name, tensor in ours.named_buffers():
        setattr(replica, name, tensor)
    x, _ = batch()
    torch.testing.assert_close(replica(x), native(x), **FLOAT64)
    assert_same(dict(ours.named_buffers()), dict(native.named_buffers()))


def test_nets_are_what_the_tests_take_them_for():
    """Guards the tests above against nets without batch norms."""
    assert sum(isinstance(m, nn.BatchNorm2d) for m in SmallResNet().modules()) == 9
