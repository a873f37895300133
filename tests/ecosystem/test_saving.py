"""Nets in files and copies: checkpoints old and new, the meta device, pickle, other processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn

import bnorm_ext
from tests.common.net_kinds import (
    EVERY,
    KINDS,
    Net,
    assert_kind,
    backward,
    close,
    images,
    make,
    native,
)
from tests.common.twins import outcome

pytestmark = pytest.mark.usefixtures("one_thread")

CONVERTED = pytest.mark.parametrize("kind", ["converted", "fused"])


def trained(kind):
    """A net that has taken a step."""
    net = make(kind)
    backward(net, images(9))
    net.zero_grad()
    return net


def through_file(thing, **kwargs):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **kwargs)


# ---- Copies -------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: through_file(net, weights_only=False),
    "twice": lambda net: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(net)))),
}


@pytest.mark.parametrize("how", COPIES)
@EVERY
def test_copies(kind, how):
    """Of the same make, with tensors of their own; they train as the first does."""
    net = trained(kind)
    twin = COPIES[how](net)
    assert_kind(twin, kind)
    assert twin.training
    own = {t.data_ptr() for t in net.state_dict().values()}
    assert not own & {t.data_ptr() for t in twin.state_dict().values()}
    before = copy.deepcopy(net.state_dict())
    seen = backward(twin, images())
    close(dict(net.state_dict()), dict(before))
    close(seen, backward(net, images()))
    close(twin.eval()(images()), trained_on(images(9), images()).eval()(images()))


def trained_on(*batches):
    net = make("native")
    for x in batches:
        backward(net, x)
    return net


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_fused_nets_can_be_unfused(how):
    twin = COPIES[how](trained("fused"))
    tensors = dict(twin.state_dict(keep_vars=True))
    twin.unfuse()
    assert not hasattr(twin, "unfuse")
    assert all(tensors[n] is t for n, t in twin.state_dict(keep_vars=True).items())
    close(backward(twin, images()), backward(trained_on(images(9)), images()))


def test_a_copy_is_independent_of_unfusing_the_first():
    net = trained("fused")
    twin = copy.deepcopy(net)
    net.unfuse()
    assert_kind(twin, "fused")
    assert_kind(net, "native")
    close(backward(twin, images()), backward(net, images()))


# ---- Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"weights_only": True}, {"mmap": True}], ids=str)
@EVERY
def test_state_dict_in_a_file(kind, options, tmp_path):
    """Ours into native and native's into ours, strictly, by copying and by assigning."""
    for source, target in ((kind, "native"), ("native", kind), (kind, kind)):
        net = trained(source)
        torch.save(net.state_dict(), tmp_path / "net.pt")
        loaded = torch.load(tmp_path / "net.pt", **options)
        assert type(loaded) is OrderedDict
        assert loaded._metadata == native().state_dict()._metadata
        for assign in (False, True):
            other = make(target, seed=1)
            other.load_state_dict(loaded, strict=True, assign=assign)
            close(dict(other.state_dict()), dict(net.state_dict()))
            close(other.eval()(images()), copy.deepcopy(net).eval()(images()))


def old(state, keep_metadata):
    """As torch 0.3 wrote it: without counters, version 1 or no version at all."""
    aged = OrderedDict((n, t) for n, t in state.items() if "num_batches_tracked" not in n)
    if keep_metadata:
        aged._metadata = OrderedDict((n, {"version": 1}) for n in state._metadata)
    return aged


@pytest.mark.parametrize("keep_metadata", [True, False], ids=["version 1", "no version"])
@EVERY
def test_old_checkpoint(kind, keep_metadata):
    state = old(trained("native").state_dict(), keep_metadata)
    results = []
    for name in (kind, "native"):
        net = make(name, seed=1)
        net.load_state_dict(copy.copy(state), strict=True)
        results.append({"y": copy.deepcopy(net).eval()(images()), **backward(net, images())})
    close(*results)


@EVERY
def test_checkpoints_that_do_not_fit(kind):
    """The same complaint as native's, names and sizes included."""
    state = native().state_dict()
    lacking = OrderedDict((n, t) for n, t in state.items() if n != "bn2.num_batches_tracked")
    lacking._metadata = state._metadata
    wrong = OrderedDict(state, **{"bn1.weight": torch.ones(7), "bn9.weight": torch.ones(6)})
    for bad in (lacking, wrong):
        texts = []
        for name in (kind, "native"):
            error = outcome(lambda n=name, bad=bad: make(n).load_state_dict(copy.copy(bad)))
            assert error is not None
            texts.append((error[0], error[1].partition("\n")[2]))
        assert texts[0] == texts[1]
        assert "bn" in texts[0][1]


@EVERY
def test_safetensors(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "net.safetensors"
    for source, target in ((kind, "native"), ("native", kind), (kind, kind)):
        net, other = trained(source), make(target, seed=1)
        safetensors.save_model(net, str(path))
        assert safetensors.load_model(other, str(path)) == (set(), [])
        close(dict(other.state_dict()), dict(net.state_dict()))
        other = make(target, seed=1)
        other.load_state_dict(safetensors.load_file(path), strict=True)
        close(other.eval()(images()), net.eval()(images()))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@EVERY
def test_distributed_checkpoint_in_one_process(kind, tmp_path):
    for i, (source, target) in enumerate(((kind, "native"), ("native", kind))):
        net, other = trained(source), make(target, seed=1)
        dcp.save(net.state_dict(), checkpoint_id=tmp_path / str(i), no_dist=True)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / str(i), no_dist=True)
        other.load_state_dict(state, strict=True)
        close(dict(other.state_dict()), dict(net.state_dict()))


# ---- Without memory at first --------------------------------------------------------------------


def on_meta(kind):
    """Made from a net that had no memory from the start."""
    with torch.device("meta"):
        net = Net().double()
    if kind == "converted":
        return bnorm_ext.convert_batchnorm(net)
    if kind == "fused":
        return bnorm_ext.fuse_batchnorm_act(net)[0]
    return make(kind).to("meta")


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@EVERY
def test_meta_device(kind, assign):
    net = on_meta(kind)
    assert all(t.is_meta for t in net.state_dict().values())
    y = net(images().to("meta"))
    assert (y.is_meta, y.shape) == (True, (4, 4))
    if not assign:
        net.to_empty(device="cpu")
    state = make("native").state_dict()
    net.load_state_dict(state, strict=True, assign=assign)
    if assign:
        for p in net.parameters():
            p.requires_grad_()
    assert_kind(net, kind)
    close(backward(net, images()), backward(make("native"), images()))


@EVERY
def test_to_empty_then_initialised_anew(kind):
    """The way of FSDP: every module with a reset_parameters fills its own tensors."""
    results = []
    for name in (kind, "native"):
        net = on_meta(name).to_empty(device="cpu")
        torch.manual_seed(3)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert net.bn1.num_batches_tracked == 0
        results.append(backward(net, images()))
    close(*results)


class LazyNet(Net):
    def __init__(self, norm=nn.LazyBatchNorm2d):
        super().__init__(lambda _: norm())


@CONVERTED
def test_lazy_net(kind):
    """Converted before its first call; fused after it, when it is a plain net."""
    lazy = LazyNet().double()
    if kind == "converted":
        lazy = bnorm_ext.convert_batchnorm(lazy)
        assert [type(m) for m in (lazy.bn1, lazy.bn3)] == [bnorm_ext.LazyBatchNorm2d] * 2
        lazy(images())
        assert lazy.bn1.num_batches_tracked == 1
    else:
        lazy(images())
        lazy = bnorm_ext.fuse_batchnorm_act(lazy)[0]
    lazy.load_state_dict(native().state_dict(), strict=True)
    assert_kind(lazy, kind)
    close(backward(lazy, images()), backward(make("native"), images()))


def test_lazy_net_takes_a_checkpoint_before_its_first_call():
    lazy = bnorm_ext.convert_batchnorm(LazyNet().double())
    lazy.load_state_dict(native().state_dict(), strict=True)
    close(backward(lazy, images()), backward(make("native"), images()))
    assert_kind(lazy, "converted")


def test_lazy_net_fused_before_its_first_call():
    """What cannot be known yet must not be guessed wrong: the net computes what it would have."""
    fused, _ = bnorm_ext.fuse_batchnorm_act(LazyNet().double())
    fused(images())
    fused.load_state_dict(native().state_dict(), strict=True)
    close(backward(fused, images()), backward(make("native"), images()))


# ---- Another process ----------------------------------------------------------------------------


def _train_in_child(rank, path, nets):
    """What the parent reads: the results of the nets as they came here."""
    torch.set_num_threads(1)
    results = {}
    for kind, net in nets.items():
        if kind != "native":
            assert_kind(net, kind)
        results[kind] = backward(net, images())
    torch.save(results, path)


@pytest.mark.parametrize("kinds", [KINDS[:2], KINDS[2:]], ids=str)
def test_spawned(kinds, tmp_path):
    """Pickled to a child that imports everything anew; parameters are shared memory there."""
    nets = {kind: make(kind).share_memory() for kind in (*kinds, "native")}
    path = tmp_path / "results.pt"
    context = mp.spawn(_train_in_child, (path, nets), nprocs=1, join=False)
    try:
        for _ in range(60):
            if context.join(timeout=2):
                break
        else:
            pytest.fail("the child has not ended")
    finally:
        for process in context.processes:
            process.kill()
    results = torch.load(path)
    for kind, net in nets.items():
        close(results[kind], results["native"])
        # The child's running statistics are the parent's.
        close(dict(net.named_buffers()), {n: results[kind][n] for n, _ in net.named_buffers()})
        assert net.bn1.num_batches_tracked == 4
