"""How the benchmark measures: statistics and rounds; never the times."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnorm_ext.bench import clocks, machine, measure
from bnorm_ext.bench.measure import Work, describe, percentile, sample, within_noise
from tests.common.fake_cuda import FakeCuda

pytestmark = pytest.mark.usefixtures("process_as_it_was")
GLIBC = platform.libc_ver()[0] == "glibc"
ROOT = Path(__file__).resolve().parents[2]


def test_percentiles_lie_between_samples():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.1) == pytest.approx(1)
    assert percentile(list(range(101)), 0.9) == pytest.approx(90)
    assert percentile([7], 0.9) == 7


def test_halves_are_those_of_the_order_of_time():
    s = describe([1, 2, 3, 10, 20, 30])
    assert (s.first_half, s.second_half, s.drift, s.rounds) == (2, 20, 18, 6)
    assert s.median == 6.5
    assert describe([5]).drift == 0


def test_a_claim_is_noise_where_either_side_drifts_by_more():
    steady, faster = describe([100] * 10), describe([90] * 10)
    assert not within_noise(faster, steady)
    assert within_noise(describe([80] * 5 + [100] * 5), steady)
    assert within_noise(faster, describe([90] * 5 + [110] * 5))


class FakeTimer:
    """Takes as long as the works' names say."""

    gaps, step = False, 1

    def __init__(self):
        self.asked, self.faults = [], {}

    def ready(self):
        return measure.contextlib.nullcontext()

    def rounds(self, works, count):
        self.asked.append(count)
        return [[float(w.name) for w in works]] * count


def test_rounds_are_bounded_from_below_and_above():
    works = [Work("3", int), Work("5", int)]
    timer = FakeTimer()
    found = sample(works, timer, seconds=1e-9).stats
    assert found["3"].rounds == found["5"].rounds == measure.MIN_ROUNDS
    assert sample(works, timer, seconds=-1).stats["3"].rounds == measure.HURRIED_ROUNDS
    assert (found["3"].median, found["5"].median) == (3, 5)
    assert timer.asked[0] == measure.WARM_UP
    assert sample(works, FakeTimer(), seconds=100).stats["3"].rounds == measure.MAX_ROUNDS


@pytest.mark.parametrize("cache", measure.CACHES)
def test_each_round_calls_each_work_once_prepared_and_keeps_the_result(cache):
    events, alive = [], []

    class Result:
        pass

    def work(name):
        def call():
            assert not any(ref() for ref in alive)  # of the call before
            events.append(name)
            result = Result()
            alive.append(weakref.ref(result))
            return result

        return Work(name, call, lambda: events.append("prepare"))

    timer = measure.CpuTimer(cache)
    times = timer.rounds([work("a"), work("b")], 4)
    assert [len(t) for t in times] == [2] * 4
    assert min(min(t) for t in times) > 0
    assert events[::2] == ["prepare"] * (len(events) // 2)
    each = 1 if cache == "cold" else 2  # warm: an untimed call before
    called = events[1::2]
    for i in range(4):
        assert sorted(called[2 * each * i : 2 * each * (i + 1)]) == ["a"] * each + ["b"] * each
    assert len(timer.faults["a"]) == 4


def test_the_order_within_rounds_changes_and_is_the_same_in_every_run():
    orders = [measure._order(3, i) for i in range(20)]
    assert len({tuple(o) for o in orders}) > 3
    assert orders == [measure._order(3, i) for i in range(20)]


def check_page_faults():
    """Large outputs are fresh in a cold run and used again in a warm one, whatever lies free in the
    heap."""
    machine.fresh_outputs(False)
    holes = [torch.ones(3 << 20) for _ in range(5)]
    del holes[::2]
    faults = {}
    x = torch.ones(2 << 20)  # 8 MB
    for cache in measure.CACHES:
        found = sample([Work("clone", x.clone)], measure.CpuTimer(cache), 0)
        faults[cache] = found.faults["clone"]
    machine.fresh_outputs(True)
    page = os.sysconf("SC_PAGE_SIZE")
    assert faults["warm"] < 50
    # Huge pages, where the system gives them unasked, are 2 MB each.
    assert faults["cold"] >= 3
    if "[always]" not in (machine._text("/sys/kernel/mm/transparent_hugepage/enabled") or ""):
        assert faults["cold"] >= x.nbytes / page


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc can be told")
def test_large_outputs_are_fresh_in_a_cold_run_and_used_again_in_a_warm_one():
    check_page_faults()


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc can be told")
def test_large_outputs_are_fresh_where_the_heap_is_in_parts():
    """glibc continues its heap elsewhere if other memory is in the way."""
    program = """if True:
        import ctypes, os
        libc = ctypes.CDLL(None)
        libc.sbrk.restype = libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        from tests.bench.test_bench_measure import check_page_faults
        page = os.sysconf("SC_PAGE_SIZE")
        end = -(-libc.sbrk(0) // page) * page
        private, anonymous, in_no_others_place = 0x02, 0x20, 0x100000
        flags = private | anonymous | in_no_others_place
        assert libc.mmap(end, page, 0, flags, -1, 0) == end
        check_page_faults()
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("queueing", [1e-6, 1e-3])
def test_cuda_events_hold_no_gaps_between_launches(monkeypatch, queueing):
    fake = FakeCuda(monkeypatch, queueing)
    timer = measure.CudaTimer("warm", torch.device("cuda"))
    found = timer.rounds([Work("a", fake.run(30)), Work("b", fake.run(50))], 5)
    assert not timer.gaps
    for times in found:
        assert times == pytest.approx([30, 50], rel=1e-3)
    # A slow host makes the device sleep longer.
    assert (max(fake.slept[2:]) > 0.02) == (queueing == 1e-3)


def test_cuda_says_where_the_host_is_too_slow(monkeypatch):
    fake = FakeCuda(monkeypatch, queueing=0.1)
    timer = measure.CudaTimer("warm", torch.device("cuda"))
    timer.rounds([Work("a", fake.run(30))], 5)
    assert timer.gaps
    assert max(fake.slept) <= timer.LONGEST


def test_nothing_dirty_is_left_in_the_l2_before_a_cold_call(monkeypatch):
    """What is written is driven out by reads of other memory, at least an L2 of it."""
    FakeCuda(monkeypatch, 1e-6)
    seen = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append((op.overloadpacket.__name__, args[0].data_ptr(), args[0].nbytes))
            return op(*args, **(kwargs or {}))

    timer = measure.CudaTimer("cold", torch.device("cpu"))
    seen.clear()
    x = torch.zeros(8)
    with Recorded():
        timer.rounds([Work("a", x.abs, prepare=x.neg)], 1)
    assert [name for name, *_ in seen] == ["neg", "zero_", "sum", "abs"]
    (_, written, size), (_, read, read_size) = seen[1:3]
    assert size == read_size == 2 << 20
    assert abs(read - written) >= size


class FakeNvml:
    """An NVML that knows one GPU."""

    def __init__(self, reasons, init=0):
        self.reasons, self.init, self.known = list(reasons), init, b"GPU-1234"

    def nvmlInit_v2(self):
        return self.init

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        return 0 if name == self.known else 6

    def nvmlDeviceGetClockInfo(self, gpu, kind, value):
        value._obj.value = {1: 1980 - 5 * len(self.reasons), 2: 2619}[kind]
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu, bits):
        bits._obj.value = self.reasons.pop(0)
        return 0


def test_clocks_and_what_lowers_them(monkeypatch):
    monkeypatch.setattr(clocks, "_library", lambda: FakeNvml([0, 0x4, 0x44, 0]))
    found = clocks.Clocks("1234")
    for _ in range(4):
        found.sample()
    assert found.summary() == {
        "samples": 4,
        "sm_mhz": [1960, 1967.5, 1975],
        "memory_mhz": [2619, 2619, 2619],
        "throttled": {"power cap": 0.5, "thermal, hardware": 0.25},
    }


def test_clocks_are_sampled_while_the_device_works(monkeypatch):
    fake, times = FakeCuda(monkeypatch, 1e-6), []

    class Sampled:
        def sample(self):
            times.append((fake.host, fake.now))

    monkeypatch.setattr(measure, "clocks_of", lambda device: Sampled())
    measure.CudaTimer("warm", torch.device("cuda")).rounds([Work("a", fake.run(30))], 5)
    assert times
    assert all(host < now for host, now in times)


def test_a_machine_without_nvml_measures_without_clocks(monkeypatch):
    def missing():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234")
    )
    look_up = clocks.clocks_of.__wrapped__
    assert look_up(torch.device("cpu")) is None
    for library in (missing, lambda: FakeNvml([], init=9), object):
        monkeypatch.setattr(clocks, "_library", library)
        assert look_up(torch.device("cuda", 0)) is None
    monkeypatch.setattr(clocks, "_library", lambda: FakeNvml([]))
    assert look_up(torch.device("cuda", 0)) is not None
