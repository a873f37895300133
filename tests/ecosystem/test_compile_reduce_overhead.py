"""`torch.compile(mode="reduce-overhead")`, as far as it can be tried without a GPU: the numbers on
the CPU, and that the compiled graphs hold nothing that CUDA graphs cannot capture."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import bnorm_ext


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.average = nn.BatchNorm2d(4, momentum=None)
        self.act, self.relu = nn.ReLU6(), nn.ReLU()

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.relu(self.average(x) + x)


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = Net()
    fused, report = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(plain))
    assert len(report.fused) == 2
    return {
        "native": plain,
        "converted": bnorm_ext.convert_batchnorm(copy.deepcopy(plain)),
        "fused": fused,
    }


@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_numbers(kind: str) -> None:
    torch._dynamo.reset()
    found = nets()
    compiled = torch.compile(found[kind], mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        y, z = compiled(x), found["native"](x)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        y.square().sum().backward(), z.square().sum().backward()
    pairs = zip(found[kind].parameters(), found["native"].parameters(), strict=True)
    for ours, native in pairs:
        torch.testing.assert_close(ours.grad, native.grad, rtol=1e-3, atol=1e-3)


# Reading a value on the host waits for the device; a tensor on another device than the inputs'
# makes the compiler run the graph without CUDA graphs.
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "lift_fresh")


@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_graphs_can_be_captured(kind: str) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    net = nets()[kind]
    compiled = torch.compile(net, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    compiled(torch.randn(4, 3, 5, 5)).sum().backward()
    assert len(graphs) == 2
    called = [n for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    operators = [n.target for n in called if isinstance(n.target, torch._ops.OpOverload)]
    assert any(op.namespace == "bnorm_ext" for op in operators)  # the counter stays on its device
    assert [op for op in operators if op._schema.name.split("::")[1] in WAITS] == []
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # from torch 2.9 on
    assert [op for op in operators if unsafe in op.tags] == []
    devices = {n.meta["val"].device.type for n in called if hasattr(n.meta.get("val"), "device")}
    assert devices == {"cpu"}
