"""SyncBatchNorm over more processes than a test usually starts, and over two hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnorm_ext
from tests.common.ranks import ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
WORLD = 8


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 3), nn.BatchNorm1d(3)),
    ).double()


def train(net: nn.Module, samples: slice) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(2 * WORLD, 3, 8, 8, dtype=torch.float64, generator=rng)[samples]
        optimizer.zero_grad()
        F.softplus(net(x)).square().mean().backward()
        optimizer.step()
    return {n: t.clone() for n, t in getattr(net, "module", net).state_dict().items()}


def share(rank: int) -> dict[str, torch.Tensor]:
    net, _ = bnorm_ext.fuse_batchnorm_act(bnorm_ext.convert_batchnorm(make(), sync=True))
    return train(DistributedDataParallel(net), slice(2 * rank, 2 * rank + 2))


def test_eight_processes_equal_one(tmp_path: Path) -> None:
    alone = train(make(), slice(None))
    with ranks(WORLD, tmp_path) as group:
        for state in group(share):
            torch.testing.assert_close(state, alone, rtol=1e-9, atol=1e-9)


# --- two hosts ------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: name and address of each."""
    mark = f"bnorm{os.getpid() % 10_000}"
    names = [f"{mark}a", f"{mark}b"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1],
           "netns", names[1])  # fmt: skip
        hosts = []
        for i, name in enumerate(names, 1):
            address = f"10.213.77.{i}"
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                ip("-n", name, "link", "set", device, "up")
            hosts.append((name, address))
        yield hosts
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def torchrun(host: tuple[str, str], node: int, master: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    name, address = host
    command = [
        *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:29513", "--rdzv-id", "hosts"),
        # torchrun tells the rendezvous' host by the host's name, which both share here.
        *("--rdzv-conf", f"is_host={int(node == 0)},timeout=60"),
        *("--local-addr", address, "-m", "tests.common.hosts"),
    ]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts(tmp_path: Path) -> None:
    """`torchrun --nnodes 2` with its rendezvous on the first."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    with contextlib.ExitStack() as stack:
        try:
            hosts: list[Any] = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        running = [torchrun(host, node, hosts[0][1]) for node, host in enumerate(hosts)]
        try:
            printed = [process.communicate(timeout=240)[0] for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
    text = "\n".join(printed)
    assert [process.returncode for process in running] == [0, 0], text
    assert "rank 0 of 2: equal" in text
    assert "rank 1 of 2: equal" in text
