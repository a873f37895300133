"""Nets in torch's data parallel wrappers, on gloo between processes of this machine, against
native in the same wrapper: DistributedDataParallel, FullyShardedDataParallel, fully_shard."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.common.net_kinds import EVERY, KINDS, assert_kind, backward, close, images, make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="this torch was built without gloo",
    ),
]

WORLD = 2
KINDS_AND_NATIVE = (*KINDS, "native")


# ---- In one process -----------------------------------------------------------------------------


@EVERY
def test_data_parallel_without_devices(kind):
    """Where there is no GPU, nn.DataParallel calls the net that it wraps."""
    results = []
    for name in (kind, "native"):
        wrapped = nn.DataParallel(make(name))
        if wrapped.device_ids:
            pytest.skip("it would use the GPUs; this is about the CPU")
        results.append(backward(wrapped, images()))
    close(*results)


def replicate(net):
    """As nn.parallel.replicate does, which needs GPUs to copy to: shallow copies of the modules
    whose parameters are plain tensors with a gradient path to the first ones."""
    copies = {m: m._replicate_for_data_parallel() for m in net.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            setattr(replica, name, None if buffer is None else buffer.clone())
    return copies[net]


@EVERY
def test_data_parallel_replicas_in_threads(kind):
    """The replicas of one net run at the same time, and their gradients meet in it."""
    results = []
    for name in (kind, "native"):
        net = make(name)
        replicas = [replicate(net) for _ in range(2)]
        outputs, failures = [None, None], []

        def work(i, replicas=replicas, outputs=outputs, failures=failures):
            try:
                outputs[i] = replicas[i](images(i))
            except Exception as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert failures == []
        torch.cat(outputs).square().sum().backward()
        found = {f"d{n}": p.grad for n, p in net.named_parameters()}
        buffers = {f"{i} {n}": b for i, r in enumerate(replicas) for n, b in r.named_buffers()}
        results.append({"y": torch.cat(outputs).detach(), **found, **buffers})
        close(dict(net.named_buffers()), dict(make("native").named_buffers()))
    close(*results)


# ---- Between processes --------------------------------------------------------------------------


def _child(rank, body, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(body(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a function of the rank in WORLD processes and returns what each of them returned."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # no name of this host is looked up
    started = []

    def start(body):
        context = mp.spawn(_child, (body, tmp_path), nprocs=WORLD, join=False)
        started.append(context)
        for _ in range(60):
            if context.join(timeout=2):  # raises what a child has raised
                return [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
        return pytest.fail("the processes have not ended")

    yield start
    for context in started:
        for process in context.processes:
            process.kill()


def train(net, rank, full):
    """Two steps on the rank's own images, and the whole state afterwards."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    seen = {}
    for step in range(2):
        optimizer.zero_grad()
        y = net(images(10 * step + rank))
        y.square().mean().backward()
        optimizer.step()
        seen[f"y{step}"] = y.detach()
    state = {n: t.clone() for n, t in full(net).items()}
    net.eval()
    return seen | state | {"evaluation": net(images(50)).detach()}


def assert_as_native(results):
    """On each rank; and the ranks have other images, but the same parameters afterwards."""
    for result in results:
        for kind in KINDS:
            close(result[kind], result["native"])
    first, second = (r["native"] for r in results)
    for name, tensor in first.items():
        if name.startswith(("fc.weight", "bn2.weight")):
            assert torch.equal(tensor, second[name]), name
        if name.startswith(("y0", "y1")):
            assert not torch.equal(tensor, second[name]), name


def add(found, kind, result, variant):
    found.setdefault(kind, {}).update({f"{n} {variant}": t for n, t in result.items()})


DDP = {
    "default": {},
    "buffers by rank": {"broadcast_buffers": False, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
}


def _ddp(rank):
    found = {}
    for kind in KINDS_AND_NATIVE:
        for variant, options in DDP.items():
            # From different states: rank 0's is taken.
            net = make(kind, seed=rank)
            wrapped = nn.parallel.DistributedDataParallel(net, **options)
            add(found, kind, train(wrapped, rank, lambda w: w.module.state_dict()), variant)
            if kind != "native":
                assert_kind(wrapped.module, kind)
    return found


def test_distributed_data_parallel(run):
    results = run(_ddp)
    assert_as_native(results)
    # The last step's, of each rank's images.
    means = [r["act"]["bn1.running_mean buffers by rank"] for r in results]
    assert not torch.equal(*means)
    assert results[0]["act"]["bn1.num_batches_tracked default"] == 5


def _fsdp(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def full(net):
        with FSDP.summon_full_params(net, writeback=False):
            return {n: t.clone() for n, t in net.state_dict().items()}

    found = {}
    for kind in KINDS_AND_NATIVE:
        # Batch norms are units of their own, so that they are called through a wrapper, or not.
        for units in (set(), {type(make(kind).bn1), nn.Conv2d}):
            for use_orig_params in (True, False):
                wrapped = FSDP(
                    make(kind),
                    auto_wrap_policy=ModuleWrapPolicy(units) if units else None,
                    use_orig_params=use_orig_params,
                    device_id=torch.device("cpu"),
                )
                variant = f"{bool(units)} {use_orig_params}"
                add(found, kind, train(wrapped, rank, full), variant)
    return found


def _fully_shard(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def full(net):
        state = net.state_dict()
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}

    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for kind in KINDS_AND_NATIVE:
        for nested in (False, True):
            net = make(kind)
            for child in (net.conv1, net.bn1, net.bn2) if nested else ():
                fully_shard(child, mesh=mesh)
            fully_shard(net, mesh=mesh)
            assert isinstance(net.fc.weight, DTensor)
            add(found, kind, train(net, rank, full), nested)
    return found


def test_fully_sharded_data_parallel(run):
    assert_as_native(run(_fsdp))


def test_fully_shard(run):
    assert_as_native(run(_fully_shard))
