"""A GPU that the CUDA kernels are not compiled for takes native's path, and this is said once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bnorm_ext
from bnorm_ext import _cuda, _load, functional


class Compiled:
    """In place of the compiled module, with code for every GPU but number 0 (and None, a CPU's)."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []
        self.current: int | None = None

    def has_code(self) -> bool:
        self.asked.append(self.current)
        return self.current == 1

    def set_beside_collectives(self, value: bool) -> None:
        pass

    @contextlib.contextmanager
    def device(self, index: int | None) -> Any:
        self.current = index
        yield


@pytest.fixture
def compiled(monkeypatch) -> Compiled:
    """As if these were such GPUs, whatever is here."""
    found = Compiled()
    monkeypatch.setattr(_cuda, "_compiled", found)
    monkeypatch.setattr(_cuda, "_has_code", {})
    monkeypatch.setattr(_load, "_warned_of_code", False)
    monkeypatch.setattr(_load, "build_info", lambda: {"archs": ["8.0", "9.0"]})
    monkeypatch.setattr(functional, "KERNEL_DEVICES", frozenset({"cpu", "meta", "cuda"}))
    monkeypatch.setattr(functional, "ASKED_DEVICES", frozenset({"cuda"}))
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    return found


def on_cuda(index: int) -> torch.Tensor:
    """No GPU is needed: it has a device, a shape and no memory."""
    with FakeTensorMode():
        return torch.empty((4, 3, 2, 2), device=f"cuda:{index}")


def test_said_once_and_asked_once(compiled) -> None:
    x = on_cuda(0)
    with pytest.warns(
        UserWarning, match="compiled for GPUs of compute capability 8.0, 9.0"
    ) as said:
        assert functional._takes_native_path(x)
    text = str(said[0].message)
    assert "this one (Tesla V100) has 7.0: torch's own batch norm runs on it" in text
    assert f"TORCH_CUDA_ARCH_LIST=7.0 BNORM_EXT_CUDA=1 {_load.REBUILD}" in text
    assert "BNORM_EXT_WARN=0" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional._takes_native_path(x)
        assert not functional._takes_native_path(on_cuda(1))
        assert not functional._takes_native_path(on_cuda(1))
    assert compiled.asked == [0, 1]


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable_silences_it(value: str) -> None:
    code = "from bnorm_ext import _load; print(_load._warned_of_code)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BNORM_EXT_WARN": value},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(value == "0")


def test_native_runs(compiled, monkeypatch) -> None:
    """On a CPU that is asked like a GPU: the result is native's, with its activation."""
    monkeypatch.setattr(functional, "ASKED_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(functional, "_training_op", None)
    x = torch.randn(4, 3, 2, 2)
    with pytest.warns(UserWarning, match="torch's own batch norm runs"):
        y = bnorm_ext.batch_norm(x, None, None, training=True, act="relu")
    expected = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("has_code", [False, True])
def test_graphs_have_one_path_or_the_other(compiled, monkeypatch, has_code: bool) -> None:
    """Asked while tracing, without a break."""
    monkeypatch.setattr(functional, "ASKED_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(Compiled, "has_code", lambda self: has_code)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def call(x: torch.Tensor) -> torch.Tensor:
        return bnorm_ext.batch_norm(x, None, None, training=True, act="relu")

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(call, backend=backend, fullgraph=True)(torch.randn(4, 3, 2, 2))
    torch._dynamo.reset()
    assert any("bnorm_ext" in target for target in targets) == has_code
