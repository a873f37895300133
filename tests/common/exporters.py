"""The exporters of torch, and what they make of a net, by the names of its operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

DYNAMIC = ({0: Dim("N", min=2, max=64)},)


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def program(net: nn.Module, x: Tensor, strict: bool = False) -> ExportedProgram:
    return torch.export.export(net, (x,), dynamic_shapes=DYNAMIC, strict=strict)


def _export(strict: bool) -> Callable[[nn.Module, Tensor, Path], list[str]]:
    def export(net: nn.Module, x: Tensor, path: Path) -> list[str]:
        exported = program(net, x, strict)
        torch.export.save(exported, path)
        return targets(exported.graph)

    return export


def _aot_inductor(net: nn.Module, x: Tensor, path: Path) -> list[str]:
    exported = program(net, x)
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return targets(exported.graph)


def _saved(module: torch.jit.ScriptModule, path: Path) -> list[str]:
    torch.jit.save(module, path)
    return [node.kind() for node in _nodes(module.inlined_graph)]


def _nodes(block: Any) -> list[Any]:
    found = []
    for node in block.nodes():
        found.append(node)
        for inner in node.blocks():
            found += _nodes(inner)
    return found


def _traced(net: nn.Module, x: Tensor, path: Path) -> list[str]:
    # The check would call the net again, and in training that changes it.
    return _saved(torch.jit.trace(net, x, check_trace=False), path)


def _scripted(net: nn.Module, x: Tensor, path: Path) -> list[str]:
    return _saved(torch.jit.script(net), path)


def _onnx(**options: Any) -> Callable[[nn.Module, Tensor, Path], list[str]]:
    def export(net: nn.Module, x: Tensor, path: Path) -> list[str]:
        import onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the older exporter is deprecated, and the like
            torch.onnx.export(net, (x,), path, verbose=False, **options)
        written = onnx.load(path)
        onnx.checker.check_model(written)
        return [f"{n.domain or 'onnx'}::{n.op_type}" for n in written.graph.node]

    return export


#: name: ending of the file, what writes it and returns the names of the operators in it
EXPORTERS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], list[str]]]] = {
    "strict": (".pt2", _export(strict=True)),
    "non-strict": (".pt2", _export(strict=False)),
    "AOTInductor": (".pt2", _aot_inductor),
    "trace": (".ts", _traced),
    "script": (".ts", _scripted),
    # Unoptimised, that batch norms are not folded into convolutions.
    "onnx": (".onnx", _onnx(dynamo=True, dynamic_shapes=DYNAMIC, optimize=False)),
    "onnx folded": (".onnx", _onnx(dynamo=True, dynamic_shapes=DYNAMIC)),
    "onnx of a trace": (
        ".onnx",
        _onnx(
            dynamo=False,
            dynamic_axes={"x": {0: "N"}},
            input_names=["x"],
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        ),
    ),
}
#: How a batch norm is called in each.
BATCH_NORM = {".pt2": "aten.batch_norm.default", ".ts": "aten::batch_norm"}
BATCH_NORM[".onnx"] = "onnx::BatchNormalization"
