"""Tracing leaves no trace: what a forward changes is noticed and put back."""

from __future__ import annotations

import collections
import copy
import itertools
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from bnorm_ext import fuse_batchnorm_act
from tests.common.fuse_nets import Around, Inner, fuse_separately, images

CALLS = 0
SEEN: list[str] = []
COUNTS = collections.Counter()
ARRAY = np.zeros(2)
BOX = types.SimpleNamespace(count=0, inner={"calls": [0]})
SETTINGS = types.ModuleType("settings")
SETTINGS.count = 0


class Holder:
    def __init__(self):
        self.count, self.inner = 0, [{"calls": 0}]


def attribute(m, x):
    m.calls = getattr(m, "calls", 0) + 1


def nested(m, x):
    m.holder.inner[0]["calls"] += 1


def array(m, x):
    m.array[1] += 1


def plain_tensor(m, x):
    m.tensor += 1


def iterator(m, x):
    next(m.iterator)


def generator(m, x):
    m.rng.standard_normal()


def queue(m, x):
    m.queue.append(1)


def child(m, x):
    m.add_module("late", nn.Identity())


def other_module(m, x):
    m.bn.note = m.training


def global_name(m, x):
    global CALLS
    CALLS += 1


def global_list(m, x):
    SEEN.append("called")


def global_counter(m, x):
    COUNTS["forward"] += 1


def global_array(m, x):
    ARRAY[0] += 1


def global_object(m, x):
    BOX.inner["calls"][0] += 1


def of_a_module(m, x):
    SETTINGS.count += 1


def class_attribute(m, x):
    type(m).total += 1


def default_argument(m, x, seen=[]):  # noqa: B006
    seen.append(1)


def enclosing():
    count = 0
    seen = []

    def closure(m, x):
        nonlocal count
        count += 1
        seen.append(count)

    closure.state = lambda: (count, list(seen))
    return closure


CHANGES = [
    attribute,
    nested,
    array,
    plain_tensor,
    iterator,
    generator,
    queue,
    child,
    other_module,
    global_name,
    global_list,
    global_counter,
    global_array,
    global_object,
    of_a_module,
    class_attribute,
    default_argument,
    enclosing(),
]


def state_of(module, change):
    own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    own["iterator"] = repr(own["iterator"])
    own["rng"] = repr(own["rng"].bit_generator.state)
    own["holder"] = copy.deepcopy(vars(own["holder"]))
    outside = CALLS, list(SEEN), dict(COUNTS), ARRAY.tolist(), repr(BOX), SETTINGS.count
    closure = getattr(change, "state", lambda: None)()
    return repr((own, outside, type(module).total, change.__defaults__, closure))


def build(change):
    class Changes(Inner):
        total = 0

        def __init__(self):
            super().__init__()
            self.holder, self.array, self.tensor = Holder(), np.zeros(3), torch.zeros(2)
            self.iterator, self.queue = itertools.count(), collections.deque()
            self.rng = np.random.default_rng(0)

        def do(self, x):
            change(self, x)
            return x

    return Around(Changes()).double()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_noticed_and_undone(change):
    plain = build(change)
    before = state_of(plain.inner, change)
    fused, report = fuse_batchnorm_act(plain)
    assert state_of(plain.inner, change) == before
    assert state_of(fused.inner, change) == before
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert "changes" in report.not_traced[0][1]
    assert {name for name, *_ in report.fused} == {
        "before.1",
        "after.1",
        "inner.stack.0.1",
        "inner.listed.0.1",
    }
    # And each call of the fused net changes it once, as in the plain one.
    separate = copy.deepcopy(plain)
    fused.eval(), separate.eval()
    torch.testing.assert_close(fused(images(0)), separate(images(0)), rtol=0, atol=1e-10)


def swallow_bool(x):
    try:
        return x * 2 if x.sum() > 0 else x * 3
    except Exception:
        return x


def swallow_iteration(x):
    try:
        return torch.stack(list(x))
    except Exception:
        return x * 5


def swallow_length(x):
    try:
        return x * len(x)
    except Exception:
        return x


def swallow_number(x):
    try:
        return x * float(x.max())
    except Exception:
        return x


def ask_type(x):
    return x * 2 if isinstance(x, torch.Tensor) else x


def ask_attribute(x):
    return x if hasattr(x, "tensors") else x * 2


def show(x):
    print("shape", x.shape)
    return x


def text(x):
    return x * len(f"{x.shape}")


def numpy_noise(x):
    return x + np.random.rand() * 0  # noqa: NPY002  # the global generator is meant


def python_noise(x):
    import random

    return x * (1 if random.random() < 2 else 2)


DECIDES = [
    swallow_bool,
    swallow_iteration,
    swallow_length,
    swallow_number,
    ask_type,
    ask_attribute,
    show,
    text,
    numpy_noise,
    python_noise,
]


@pytest.mark.parametrize("decide", DECIDES)
def test_what_tracing_would_decide_is_not_traced(decide, capsys):
    class Decides(Inner):
        def do(self, x):
            return decide(x)

    plain = Around(Decides()).double().eval()
    np.random.seed(0)  # noqa: NPY002  # so that the first draw changes the state's array
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    # A thread that only waits, as data loaders and compilers keep, changes nothing.
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    fused, report = fuse_separately(plain)
    done.set()
    assert [path for path, _ in report.not_traced] == ["inner"]
    assert "Value" not in report.not_traced[0][1]  # no private class is named
    assert "Proxy" not in report.not_traced[0][1]
    assert capsys.readouterr().out == ""
    assert (np.random.get_state()[1] == states[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    torch.testing.assert_close(fused(images(0)), plain(images(0)), rtol=0, atol=1e-10)
