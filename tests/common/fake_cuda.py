"""A GPU for the tests of the benchmark: time passes where they say so."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from bnorm_ext.bench import measure


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class FakeGraph:
    """`FakeCuda.capturing` gives it a method `replay`."""


class FakeCuda:
    """A device on which each `call` of n takes n microseconds, and a host that takes its time."""

    def __init__(self, monkeypatch, queueing):
        self.now, self.host, self.queueing, self.slept = 0.0, 0.0, queueing, []
        self.default = FakeStream()
        self.streams = [self.default]  # those that were entered, the current one last
        self.captured: list[FakeStream | None] = []  # the stream of each graph
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                fake.host += fake.queueing
                self.at = fake.now = max(fake.now, fake.host)

            def query(self):
                return fake.host >= self.at

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        cuda = measure.torch.cuda
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "_sleep", self.sleep)
        monkeypatch.setattr(cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(
            cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20)
        )
        monkeypatch.setattr(cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(cuda, "Stream", FakeStream)
        monkeypatch.setattr(cuda, "stream", self.on_stream)
        monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(cuda, "graph", self.capturing)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)

    def sleep(self, cycles):
        self.slept.append(cycles / 1e9)
        self.now = max(self.now, self.host) + cycles / 1e9

    def synchronize(self, device=None):
        self.host = self.now = max(self.now, self.host)

    def current_stream(self, device=None):
        return self.streams[-1]

    @contextlib.contextmanager
    def on_stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()

    @contextlib.contextmanager
    def capturing(self, graph, stream=None):
        """What is called meanwhile takes no time; a replay takes as long as all of it."""
        self.captured.append(stream)
        begun = self.now
        yield
        seconds, self.now = self.now - begun, begun

        def replay():
            self.host += self.queueing
            self.now = max(self.now, self.host) + seconds

        graph.replay = replay

    def run(self, microseconds):
        return lambda: setattr(self, "now", self.now + microseconds * 1e-6)
