"""Fusing while other threads train, draw random numbers or trace."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import nn

from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import Around, images, layer


def test_other_threads_see_nothing():
    """They train, draw random numbers and enter autocast while nets are fused."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(step):
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            failures.append(error)

    net = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(2)).double()
    net(images(0))

    def train():
        with torch.autocast("cpu", enabled=False):
            net(images(0)).sum().backward()

    def draw():
        torch.rand(3)
        np.random.rand()  # noqa: NPY002

    def function():
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, dy):
                return dy * 2

        x = torch.ones(2, requires_grad=True)
        Doubled.apply(x).sum().backward()
        assert x.grad.tolist() == [2, 2]

    threads = [threading.Thread(target=work, args=(f,)) for f in (train, draw, function)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            _, report = fuse_batchnorm_act(Around(layer()))
            assert len(report.fused) == 3
            assert report.not_traced == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_another_thread_traces():
    """torch's own tracing replaces the call of every module, so it may spoil ours; not the other
    way round."""
    stop = threading.Event()

    def fuse():
        while not stop.is_set():
            fuse_batchnorm_act(Around(layer()))

    thread = threading.Thread(target=fuse)
    thread.start()
    try:
        for _ in range(20):
            graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())).graph
            assert [node.op for node in graph.nodes] == [
                "placeholder",
                "call_module",
                "call_module",
                "output",
            ]
    finally:
        stop.set()
        thread.join()
