"""Under torch.fx a module of ours is one ``call_module`` node, as native's is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Tracer, symbolic_trace

from bnorm_ext.convert import convert_batchnorm
from tests.common.nets import NETS
from tests.common.twins import FLOAT64, OURS, SHAPES, outcome


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPES[2], generator=generator, dtype=torch.float64)


def net_twins(name="resnet"):
    torch.manual_seed(0)
    native = NETS[name]().double()
    return convert_batchnorm(copy.deepcopy(native)), native


def call_modules(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("name", NETS)
def test_graph_is_natives(name):
    ours, native = net_twins(name)
    traced, reference = symbolic_trace(ours), symbolic_trace(native)
    assert [(n.op, n.target) for n in traced.graph.nodes if n.op != "call_function"] == [
        (n.op, n.target) for n in reference.graph.nodes if n.op != "call_function"
    ]
    assert traced.code == reference.code
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(traced(x), reference(x), **FLOAT64)
    for name_, buffer in traced.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name_), **FLOAT64)


def test_retracing_keeps_the_leaves():
    ours, _ = net_twins()
    once = symbolic_trace(ours)
    twice = symbolic_trace(symbolic_trace(once))
    assert twice.code == once.code
    assert "head_norm" in call_modules(twice)


def test_module_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = OURS[2](5).double()

        def forward(self, x):
            return self.norm(input=x)

    x = batch()
    net = Keyword()
    traced = symbolic_trace(copy.deepcopy(net))
    assert call_modules(traced) == ["norm"]
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert list(node.kwargs) == ["input"]  # as written, for hooks that look
    assert torch.equal(traced(x), net(x))


def test_hooks_run_once_per_call_of_the_graph():
    """A leaf's hooks run when the graph runs, not while it is traced."""
    calls = []
    net = nn.Sequential(OURS[2](5).double())
    x = batch()
    plain = net(x)
    net[0].register_forward_pre_hook(lambda m, a: calls.append("pre"))
    net[0].register_forward_hook(lambda m, a, y: y * 2)
    traced = symbolic_trace(net)
    assert calls == []
    assert torch.equal(traced(x), plain * 2)
    assert calls == ["pre"]


def test_feature_extractor_style_tracer():
    """A tracer with its own call_module, which remembers the path of every node."""

    class PathTracer(Tracer):
        def __init__(self):
            super().__init__()
            self.paths, self.current = {}, ""

        def call_module(self, m, forward, args, kwargs):
            previous, self.current = self.current, self.path_of_module(m)
            try:
                if self.is_leaf_module(m, self.current):
                    return self.create_proxy("call_module", self.current, args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self.current = previous

        def create_proxy(self, *args, **kwargs):
            proxy = super().create_proxy(*args, **kwargs)
            self.paths[proxy.node] = self.current
            return proxy

    ours, native = net_twins()
    tracer = PathTracer()
    graph = tracer.trace(ours)
    wanted = next(node for node in graph.nodes if tracer.paths[node] == "layer2.0.bn1")
    assert wanted.op == "call_module"
    for node in reversed(graph.nodes):
        if node.op == "output":
            node.args = (wanted,)
    features = GraphModule(ours, graph)
    features.graph.eliminate_dead_code()
    features.recompile()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    seen = []
    native.layer2[0].bn1.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    native(x)
    torch.testing.assert_close(features(x), seen[0], **FLOAT64)


def test_subclass_from_elsewhere_is_no_leaf():
    """Native has no leaf there either: recording the whole module would be a silent mistake if
    its own forward called ours."""

    class Doubled(OURS[2]):
        def forward(self, x):
            return 2 * super().forward(x)

    class NativeDoubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    expected = outcome(lambda: symbolic_trace(nn.Sequential(NativeDoubled(5))))
    assert expected is not None
    assert outcome(lambda: symbolic_trace(nn.Sequential(Doubled(5)))) == expected
