"""Quantisation of exported nets: its patterns find in ours what they find in native's."""

from __future__ import annotations

import collections
import warnings

import pytest
import torch
from torch import Tensor, nn

import bnorm_ext
from tests.common.exporters import program

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pt2e = pytest.importorskip(
        "torchao.quantization.pt2e.quantize_pt2e",
        reason="torch's quantisation of exported programs has moved to torchao",
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


class Net(nn.Module):
    """Convolution with batch norm and ReLU, and with an addition between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class ActNet(Net):
    """The same with modules that add and activate."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = bnorm_ext.BatchNormAct2d(8), bnorm_ext.BatchNormAct2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.fc(self.bn2(self.conv2(x), x).mean((2, 3)))


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = ActNet() if kind == "act" else Net()
    if kind == "converted":
        return bnorm_ext.convert_batchnorm(net)
    if kind == "fused":
        net, report = bnorm_ext.fuse_batchnorm_act(net)
        assert len(report.fused) == 2
    return net


def quantised(kind: str, training: bool) -> tuple[list[list[str]], Tensor]:
    """The operators after preparing and after converting, and what the result computes."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    exported = program(make(kind).train(training), x).module()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=training)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    prepare = pt2e.prepare_qat_pt2e if training else pt2e.prepare_pt2e
    prepared = prepare(exported, quantizer)
    prepared(x)
    graphs = [[str(node.target) for node in prepared.graph.nodes]]
    converted = pt2e.convert_pt2e(prepared)
    graphs.append([str(node.target) for node in converted.graph.nodes])
    return graphs, converted(x)


@pytest.mark.filterwarnings("ignore")  # of torchao's own
@pytest.mark.parametrize("kind", ["converted", "fused", "act"])
def test_quantised_after_training(kind):
    (graphs, y), (natives, expected) = (quantised(name, False) for name in (kind, "native"))
    for graph, native in zip(graphs, natives, strict=True):
        assert collections.Counter(graph) == collections.Counter(native)
    assert_folded_and_quantised(graphs[1])
    # The same graph on the same numbers.
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # of torchao's own
@pytest.mark.parametrize("kind", ["converted", "fused", "act"])
def test_quantisation_aware_training(kind):
    """Some patterns look for torch.nn.modules.batchnorm.BatchNorm2d by name among the modules that
    an operator came from, and find it after reverting only. What is computed is the same."""
    (graphs, _), (natives, _) = (quantised(name, True) for name in (kind, "native"))
    assert without_observers(graphs[0]) == without_observers(natives[0])
    assert_folded_and_quantised(graphs[1])


@pytest.mark.filterwarnings("ignore")  # of torchao's own
@pytest.mark.parametrize("kind", ["converted", "fused"])
def test_quantisation_aware_training_after_reverting(kind, monkeypatch):
    natives, expected = quantised("native", True)
    of_kind = make(kind)
    monkeypatch.setitem(globals(), "make", lambda _: bnorm_ext.revert_batchnorm(of_kind))
    graphs, y = quantised(kind, True)
    assert [sorted(graph) for graph in graphs] == [sorted(graph) for graph in natives]
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def without_observers(graph: list[str]) -> collections.Counter[str]:
    return collections.Counter(t for t in graph if not t.startswith("activation_post_process"))


def assert_folded_and_quantised(graph: list[str]) -> None:
    assert not [target for target in graph if "batch_norm" in target]
    assert sum("quantized_decomposed.dequantize" in target for target in graph) > 3
