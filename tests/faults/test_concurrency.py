"""Many at once: threads on their own modules and on a shared one, processes on shared parameters,
workers, a fork after the kernels have run, fusing while others train. Whatever is defined is equal
to what comes out one after the other, bit by bit."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnorm_ext
from tests.common.cases import threads
from tests.common.net_kinds import EVERY, images, make

WORKERS = 8
STEPS = 6


def at_once(work: Callable[[int], Any], count: int = WORKERS) -> list[Any]:
    """``work(i)`` for each i, all begun before the first goes on."""
    start = threading.Barrier(count, timeout=60)

    def begin(i: int) -> Any:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def trained(net: nn.Module, seed: int, steps: int = STEPS) -> dict[str, Tensor]:
    """All that training leaves, gradients included."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(images().shape, generator=generator, dtype=torch.float64)
        net(x).square().mean().backward()
        optimizer.step()
    found = {name: t.detach().clone() for name, t in net.state_dict().items()}
    for name, p in net.named_parameters():
        assert p.grad is not None
        found[f"grad {name}"] = p.grad.clone()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


@pytest.mark.parametrize("each", [1, 2], ids=["one thread each", "two threads each"])
@EVERY
def test_threads_train_their_own_modules(kind, each):
    nets = [make(kind, seed=i).train() for i in range(2 * WORKERS)]
    for i in range(WORKERS):
        nets[WORKERS + i].load_state_dict(nets[i].state_dict())
    with threads(each):  # torch's convolutions depend on it
        alone = [trained(nets[i], i) for i in range(WORKERS)]

    def work(i: int) -> dict[str, Tensor]:
        with threads(each):
            return trained(nets[WORKERS + i], i)

    for together, one in zip(at_once(work), alone, strict=True):
        assert_same(together, one)


def test_a_thread_keeps_its_number_of_threads():
    """`torch.set_num_threads` is a thread's own, and others set theirs before this one first calls
    an operator. Were it lost, torch's convolutions would round differently from then on."""
    bn = bnorm_ext.BatchNorm2d(4)
    images = torch.randn(2, 4, 300, 300)  # large enough for several threads
    others_have_set = threading.Event()
    one_has_set = threading.Event()

    def work() -> int:
        with threads(1):
            one_has_set.set()
            assert others_have_set.wait(60)
            bn(images.requires_grad_()).sum().backward()
            return torch.get_num_threads()

    with threads(2), ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        assert one_has_set.wait(60)
        torch.set_num_threads(2)
        others_have_set.set()
        assert result.result() == 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_threads_share_a_module(training):
    """Outputs and gradients do not depend on what others do to the running statistics, which in
    training are those of some order. No batch changes them beyond what it has."""
    bn = bnorm_ext.BatchNormAct2d(5, act="silu").double().train(training)
    inputs = [torch.randn(6, 5, 40, 41, dtype=torch.float64) + i for i in range(WORKERS)]

    def work(i: int) -> list[Tensor]:
        results = []
        for _ in range(20):
            x = inputs[i].clone().requires_grad_()
            y = bn(x)
            results = [y, *torch.autograd.grad(y.square().sum(), [x, bn.weight, bn.bias])]
        return results

    with threads(1):
        alone = [work(i) for i in range(WORKERS)]
        bn.reset_running_stats()
        together = at_once(work)
    for many, one in zip(together, alone, strict=True):
        assert all(map(torch.equal, many, one))
    if training:
        assert 0 < bn.num_batches_tracked <= 20 * WORKERS
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs])
        assert (bn.running_mean >= means.amin(0).clamp(max=0)).all()
        assert (bn.running_mean <= means.amax(0)).all()
        assert (bn.running_var >= 0.9).all()
        assert (bn.running_var <= 1.1).all()
    else:
        assert bn.num_batches_tracked == 0


def test_the_engine_runs_backward_in_its_own_threads():
    """Graphs of several threads that meet in one backward pass."""
    bn = bnorm_ext.BatchNorm2d(5).double()
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    one, *others = at_once(lambda _: bn(x))
    (one + sum(others)).square().sum().backward()
    together = bn.weight.grad
    bn.weight.grad = None
    (WORKERS * bn(x)).square().sum().backward()
    torch.testing.assert_close(together, bn.weight.grad, rtol=1e-12, atol=1e-12)


def test_fusing_while_others_train():
    """Fusing runs forwards too, on copies; it patches nothing, so nobody notices."""
    nets = [make("fused" if i % 2 else "converted", seed=i).train() for i in range(WORKERS)]
    with threads(1):
        alone = [trained(nets[i], i, 3) for i in range(WORKERS)]
        for i in range(WORKERS):
            nets[i] = make("fused" if i % 2 else "converted", seed=i).train()

        def work(i: int) -> Any:
            if i < WORKERS:
                return trained(nets[i], i, 3)
            reports = [bnorm_ext.fuse_batchnorm_act(make("native"))[1].fused for _ in range(2)]
            assert [[name for name, *_ in found] for found in reports] == [
                ["bn1", "bn2", "bn3"]
            ] * 2
            return None

        together = at_once(work, WORKERS + 2)
    for many, one in zip(together, alone, strict=False):
        assert_same(many, one)


def test_converting_while_others_evaluate():
    """The class changes and nothing else: each call has the one or the other."""
    net = make("native").eval()
    x = images()
    expected = net(x)

    def work(i: int) -> None:
        for _ in range(20):
            if i == 0:
                bnorm_ext.convert_batchnorm(net)
                bnorm_ext.revert_batchnorm(net)
            else:
                torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)

    with threads(1):
        at_once(work, 4)


# ---- Processes -----------------------------------------------------------------------------------


def hogwild(net: nn.Module, number: int, failures: Any) -> None:
    torch.set_num_threads(1)
    try:
        trained(net, number)
    except BaseException:
        failures.put(traceback.format_exc())


def test_processes_train_shared_parameters():
    """Without locks, as Hogwild does. One process alone gives the bits of this one. (Torch refuses
    backward passes in a process that was forked after one.)"""
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    with threads(1):
        alone = trained(make("converted").train(), 0)
        for count in (1, 3):
            net = make("converted").train().share_memory()
            before = {name: t.clone() for name, t in net.state_dict().items()}
            processes = [
                context.Process(target=hogwild, args=(net, i, failures)) for i in range(count)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            assert failures.empty(), failures.get()
            assert [process.exitcode for process in processes] == [0] * count
            after = net.state_dict()
            if count == 1:
                assert_same(after, {n: t for n, t in alone.items() if not n.startswith("grad")})
            assert all(t.isfinite().all() for t in after.values())
            assert not any(torch.equal(t, before[n]) for n, t in after.items())
            counted = after["bn1.num_batches_tracked"] - before["bn1.num_batches_tracked"]
            assert 0 < counted <= count * STEPS


class Normalised(Dataset):  # type: ignore[type-arg]
    """Whose items a batch norm makes, as a preprocessing step may do."""

    def __init__(self) -> None:
        self.bn = bnorm_ext.BatchNorm2d(3).double().eval()
        self.bn.running_mean.fill_(0.5)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            item: Tensor = self.bn(images(seed=i)[:1])[0]
        return item


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    """Forked after this process has run the kernels on threads."""
    data = Normalised()
    with threads(2):
        bnorm_ext.BatchNorm2d(8)(torch.randn(32, 8, 64, 64, requires_grad=True)).sum().backward()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_after_the_kernels_have_used_threads():
    """The child has none of them, so it computes on one, as torch says it must."""
    net, x = bnorm_ext.BatchNorm2d(8), torch.randn(32, 8, 64, 64)
    with threads(2):
        expected = net(x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(writer, b"same" if torch.equal(net(x), expected) else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"same"
    os.waitpid(child, 0)
