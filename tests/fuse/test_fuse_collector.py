"""Python's garbage collector runs in the middle of a trace, with callbacks that are not the
forward's."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from bnorm_ext import fuse_batchnorm_act


class Timer:
    """As profilers and hypothesis have one: reads the clock at each collection."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, phase: str, info: Any) -> None:
        self.times.append(time.perf_counter())

    def method(self, phase: str, info: Any) -> None:
        self(phase, info)


def function(timer: Timer) -> Any:
    return lambda phase, info: timer.times.append(time.perf_counter())


@contextlib.contextmanager
def collecting_all_the_time(callback: Any) -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("kind", ["function", "method", "object"])
def test_callbacks_of_the_collector_are_not_the_forward(kind):
    timer = Timer()
    callback = {"function": function(timer), "method": timer.method, "object": timer}[kind]
    with collecting_all_the_time(callback):
        _, report = fuse_batchnorm_act(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert timer.times
    assert report.fused == [("0", "relu", False)]
