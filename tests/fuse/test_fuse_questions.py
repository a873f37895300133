"""What a forward asks of its input, or does besides computing, where a graph would give the answer
of tracing for good: it is not traced, and says why."""

from __future__ import annotations

import io
import os
import threading
import time
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import bnorm_ext
from tests.common.fuse_nets import images

FACTORS = {torch.float32: 2.0, torch.float16: 1.0}
STREAM = io.StringIO()
THREAD = threading.local()
LOCK = threading.Lock()
EVENT = threading.Event()


class Flag:
    """A context of the user's."""

    on = False

    def __enter__(self):
        Flag.on = True

    def __exit__(self, *error):
        Flag.on = False


class Twice(nn.Module):
    """A layer that is called by the graph, since it reads what may change."""

    def forward(self, x, scale=None):
        return x * 2 if Flag.on else x


class Negate(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return -result if function is torch.ops.aten.tanh.default else result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.own, self.twice = nn.Parameter(torch.full((3,), 3.0)), Twice()
        self.scale, self.flag = nn.Parameter(torch.tensor(3.0)), torch.tensor(True)

    def forward(self, x):
        return self.body(x)

    def fused(self, x):
        return F.relu(self.bn(self.conv(x)))


def image_of(x):
    try:
        return x["image"]
    except (TypeError, IndexError):
        return x


def temporary_momentum(self, x):
    x = self.fused(x)
    kept, self.other.momentum = self.other.momentum, 0.0
    x = self.other(x)
    self.other.momentum = kept
    return x


def temporary_mode(self, x):
    x = self.fused(x)
    kept = self.other.training
    self.other.training = False
    x = self.other(x)
    self.other.training = kept
    return x


def own_context(self, x):
    x = self.fused(x)
    with Flag():
        return self.twice(x)


def other_parameter(self, x):
    return torch.func.functional_call(self.other, {"weight": self.own}, (self.fused(x),))


def chosen_attention(self, x):
    x = self.fused(x)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x, x)


def own_mode(self, x):
    x = self.fused(x)
    with Negate():
        return torch.tanh(x)


def labelled(self, x):
    with torch.profiler.record_function("block"):
        return self.fused(x)


def locked(self, x):
    with LOCK:
        return self.fused(x)


def writes(self, x):
    STREAM.write("x")
    return self.fused(x)


def waits(self, x):
    time.sleep(0)
    return self.fused(x)


def sets_event(self, x):
    EVENT.set()
    return self.fused(x)


#: The forward, and words of the reason that is given.
FORWARDS = {
    "hasattr keys": (lambda s, x: s.fused(x["image"] if hasattr(x, "keys") else x), "keys"),
    "hasattr items": (lambda s, x: s.fused(x["image"] if hasattr(x, "items") else x), "items"),
    "getattr": (lambda s, x: s.fused(getattr(x, "append", x)), "append"),
    "torch.is_tensor": (lambda s, x: s.fused(x) * (2 if torch.is_tensor(x) else 1), "type"),
    "callable": (lambda s, x: s.fused(x) * (2 if callable(x) else 1), "called"),
    "is a dtype": (lambda s, x: s.fused(x) * (2 if x.dtype is torch.float32 else 1), "dtype"),
    "dtype in a dictionary": (lambda s, x: s.fused(x) * FACTORS.get(x.dtype, 5.0), "dictionary"),
    "dtype in a set": (lambda s, x: s.fused(x) * (2 if x.dtype in {torch.half} else 1), "set"),
    "device in a dictionary": (
        lambda s, x: s.fused(x) * {"cpu": 2.0}.get(x.device.type, 1.0),
        "dictionary",
    ),
    "grad_fn": (lambda s, x: s.fused(x) * (2 if x.grad_fn is None else 1), "grad_fn"),
    "identity": (lambda s, x: s.fused(x) * (2 if x.contiguous() is x else 1), "object"),
    "exceptions in a function": (lambda s, x: s.fused(image_of(x)), "exceptions"),
    "pytree": (lambda s, x: s.fused(tree_map(lambda t: t.float(), x)), "structure"),
    "dtype of autocast": (lambda s, x: s.fused(x).to(torch.get_autocast_dtype("cpu")), "autocast"),
    "thread": (
        lambda s, x: s.fused(x) * (2 if threading.current_thread().daemon else 1),
        "thread",
    ),
    "variables of a thread": (
        lambda s, x: s.fused(x) * (2 if getattr(THREAD, "on", False) else 1),
        "variables of its thread",
    ),
    "file": (lambda s, x: s.fused(x) * (2 if os.path.exists("no such file") else 1), "file"),
    "shape": (lambda s, x: s.fused(x) * (2 if x.shape[2] > 1 else 1), "shape"),
    "number of a buffer": (
        lambda s, x: s.fused(x) * int(s.other.num_batches_tracked + 2),
        "Python number",
    ),
    "number of a parameter": (lambda s, x: s.fused(x) * float(s.own[0]), "Python number"),
    "truth of a parameter": (lambda s, x: s.fused(x) * (2 if s.scale else 1), "Python number"),
    "truth of a tensor": (lambda s, x: s.fused(x) * (2 if s.flag else 1), "Python number"),
    "temporary momentum": (temporary_momentum, "changes attributes"),
    "temporary mode": (temporary_mode, "switches modules"),
    "context": (own_context, "changes on"),
    "other parameter": (other_parameter, "changes attributes"),
    "kernels of attention": (chosen_attention, "attention"),
    "mode": (own_mode, "mode"),
    "label for profilers": (labelled, "profilers"),
    "lock": (locked, "a lock"),
    "write": (writes, "a file"),
    "wait": (waits, "waits"),
    "event": (sets_event, "an event"),
}


def net_of(body):
    return type("Net", (Net,), {"body": body})()


@pytest.mark.parametrize("what", FORWARDS)
def test_is_not_traced(what):
    body, words = FORWARDS[what]
    THREAD.on = True
    STREAM.seek(0), STREAM.truncate(), EVENT.clear()
    torch.manual_seed(0)
    net, x = net_of(body), images(0).float()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert STREAM.getvalue() == ""
    assert not EVENT.is_set()
    assert words in dict(report.not_traced)["(root)"]
    for training in (False, True):
        net.train(training), fused.train(training)
        state = {k: v.clone() for k, v in net.state_dict().items()}
        expected = net(x)
        after = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(state)  # the copy has the very same tensors
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-6)
        for name, value in fused.state_dict().items():
            torch.testing.assert_close(value, after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.fused(x) * (2 if torch.is_tensor(s.own) else 1),
        lambda s, x: s.fused(x).to(x.dtype).view(x.size(0), -1),
        lambda s, x: s.fused(x) + x.mean(x.ndim - 1, keepdim=True),
        lambda s, x: s.fused(x) * (1 if s.own is None else 2),
    ],
)
def test_is_traced_all_the_same(body):
    """Questions that tracing answers right, or leaves to the graph."""
    net = net_of(body).eval()
    fused, report = bnorm_ext.fuse_batchnorm_act(net)
    assert [name for name, *_ in report.fused] == ["bn"], str(report)
    x = images(0).float()
    torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-6)


class ReluToTanh(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return torch.tanh(args[0]) if function is F.relu else function(*args, **(kwargs or {}))


def test_modes_see_the_functions_that_the_model_calls():
    net = net_of(lambda s, x: s.fused(x)).eval()
    fused, x = bnorm_ext.fuse_batchnorm_act(net)[0], images(0).float()
    with ReluToTanh():
        expected, found = net(x), fused(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found < 0).any()


def test_a_default_device_leaves_the_graph_in_place(monkeypatch):
    fused = bnorm_ext.fuse_batchnorm_act(net_of(lambda s, x: s.fused(x)).eval())[0]
    monkeypatch.setattr(Net, "fused", None)  # an own forward would fail
    fused._bnorm_ext_fusion.guard.outside = None
    with torch.device("cpu"):
        fused(images(0).float())


def test_replaced_calls_of_all_modules_see_all_modules(monkeypatch):
    net = net_of(lambda s, x: s.fused(x)).eval()
    fused, x = bnorm_ext.fuse_batchnorm_act(net)[0], images(0).float()
    original, called = nn.Module.__call__, []

    def call(self, *args, **kwargs):
        called.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    net(x), fused(x)
    assert called == ["Net", "Conv2d", "BatchNorm2d"] * 2


class Logged(torch.Tensor):
    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_residual_with_functions_of_its_own_sees_them():
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, residual):
            return F.relu(self.bn(x) + residual)

    net, x = Adds().eval(), images(0).float()
    fused, found = bnorm_ext.fuse_batchnorm_act(net)[0], []
    for module in (net, fused):
        Logged.names.clear()
        module(x, x.as_subclass(Logged))
        found.append([name for name in Logged.names if name in ("add", "relu")])
    assert found[0] == found[1] == ["add", "relu"]
