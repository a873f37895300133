"""What is exported runs without this package: every exporter writes torch's own operators.

For each make of net all files are written, then run in one other process in which bnorm_ext cannot
be imported. What such a file computes must be what the net computes eagerly.
"""

from __future__ import annotations

import collections
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.common.exporters import BATCH_NORM, EXPORTERS, program, targets
from tests.common.net_kinds import EVERY, KINDS, MODES, close, images, make
from tests.common.versions import torch_is_before

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TorchScript is deprecated, and still what some models are shipped in.
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]

ONNX = [name for name in EXPORTERS if name.startswith("onnx")]
# Float32 rounds by u = 6e-8. Outputs are of the order of 1, after three layers whose sums have at
# most 54 terms and whose batch norms multiply by at most 1.5 / sqrt(0.5) = 2.1: 3 layers *
# 54 * 2.1^3 * u = 9e-5.
FLOAT32: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


class Loaded(NamedTuple):
    results: dict[str, Any]  # by file
    expected: dict[str, Any]
    operators: dict[str, list[str]]
    errors: dict[str, Exception]


def available(exporter: str) -> None:
    if exporter in ONNX:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason="ONNX files are written and run with it")


def batches() -> list[torch.Tensor]:
    """The second is of another size: it is dynamic."""
    return [images(0, 4), images(1, 7)]


def write(net: nn.Module, exporter: str, folder: Path, mode: str) -> tuple[Path, list[str]]:
    ending, export = EXPORTERS[exporter]
    path = folder / f"{exporter} {mode}{ending}"
    if exporter in ONNX:
        net = net.float()
    x = images().to(next(net.parameters()).dtype)
    torch._dynamo.reset()
    return path, export(net, x, path)


def expect(net: nn.Module) -> dict[str, Any]:
    """What the net does from its present state on, eagerly."""
    twin = copy.deepcopy(net)
    dtype = next(twin.parameters()).dtype
    y = [twin(x.to(dtype)).detach() for x in batches()]
    return {"y": y, "buffers": dict(twin.named_buffers())}


def chosen(kind: str, training: bool) -> list[str]:
    """The exporters whose files run: onnxruntime runs no training. AOTInductor takes its time; it
    compiles training for one make only."""
    names = [name for name in EXPORTERS if not (training and name in ONNX)]
    if training and kind != "fused":
        names.remove("AOTInductor")
    try:
        available("onnx")
    except pytest.skip.Exception:
        names = [name for name in names if name not in ONNX]
    return names


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """For a make of net: everything that comes out of its files in another process."""
    done: dict[str, Loaded] = {}

    def of(kind: str) -> Loaded:
        if kind not in done:
            done[kind] = _all_files(kind, tmp_path_factory.mktemp(kind))
        return done[kind]

    return of


def _all_files(kind: str, folder: Path) -> Loaded:
    found = Loaded({}, {}, {}, {})
    for training, mode in ((False, "evaluation"), (True, "training")):
        for exporter in chosen(kind, training):
            net = make(kind).train(training)
            name = f"{exporter} {mode}"
            try:
                path, found.operators[name] = write(net, exporter, folder, mode)
            except Exception as error:  # for the test of that exporter to raise
                found.errors[name] = error
            else:
                found.expected[path.name] = expect(net)
    torch.save(batches(), folder / "inputs.pt")
    loader = Path(__file__).resolve().parents[1] / "common" / "load_exported.py"
    # -I: neither the working directory nor PYTHONPATH leads to this package.
    command = [sys.executable, "-I", str(loader), str(folder)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name in found.expected:
        found.results[name] = torch.load(folder / f"{name}.results")
    return found


@pytest.mark.parametrize("exporter", EXPORTERS)
@MODES
@EVERY
def test_loads_without_this_package(loaded, kind, training, exporter):
    available(exporter)
    if exporter not in chosen(kind, training):
        pytest.skip(
            "compiled for the fused net alone, which is exported as the others are"
            if exporter == "AOTInductor"
            else "onnxruntime does not run batch norm in training mode"
        )
    if exporter == "AOTInductor" and training and torch_is_before(2, 10):
        pytest.skip("AOTInductor cannot compile the counter, that of torch.nn.BatchNorm2d neither")
    mode = "training" if training else "evaluation"
    found: Loaded = loaded(kind)
    if f"{exporter} {mode}" in found.errors:
        raise found.errors[f"{exporter} {mode}"]
    name = f"{exporter} {mode}{EXPORTERS[exporter][0]}"
    actual, expected = found.results[name], found.expected[name]
    if exporter in ONNX:
        torch.testing.assert_close(actual["y"], expected["y"], **FLOAT32)
    else:
        close(actual["y"], expected["y"])
    # In evaluation a graph keeps no counters; a compiled package shows no buffers.
    shown = actual.get("buffers", {})
    assert bool(shown) == (exporter in ("strict", "non-strict", "trace", "script"))
    if shown:
        close(shown, {n: b for n, b in expected["buffers"].items() if training or n in shown})


@pytest.mark.parametrize("exporter", [name for name in EXPORTERS if name != "AOTInductor"])
@MODES
@EVERY
def test_operators_are_torchs(kind, training, exporter, tmp_path):
    """As many batch norms as there are modules, none of them ours, and the rest as native's."""
    available(exporter)
    mode = "training" if training else "evaluation"
    (path, found), (_, natives) = (
        write(make(name).train(training), exporter, tmp_path, mode) for name in (kind, "native")
    )
    assert not [name for name in found if "bnorm_ext" in name]
    batch_norm = BATCH_NORM[path.suffix]
    assert found.count(batch_norm) == natives.count(batch_norm)
    assert found.count(batch_norm) == (0 if exporter == "onnx folded" else 3)
    if exporter == "script":
        return  # compiled from sources that are written differently
    counted, expected = collections.Counter(found), collections.Counter(natives)
    if kind == "act":
        # Its activations are functions, none of them in place.
        counted, expected = (_without_underscores(c) for c in (counted, expected))
    assert counted == expected


def _without_underscores(counted: collections.Counter[str]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for name, count in counted.items():
        if not name.startswith("prim::"):  # attributes of modules: there are none for activations
            total[name.replace("_.", ".").removesuffix("_")] += count
    return total


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@MODES
@EVERY
def test_decompositions(kind, training, strict):
    """To the core operators."""
    torch._dynamo.reset()
    counted = []
    for name in (kind, "native"):
        exported = program(make(name).train(training), images(), strict)
        decomposed = exported.run_decompositions()
        found = targets(decomposed.graph)
        assert not [target for target in found if "bnorm_ext" in target]
        counted.append(collections.Counter(found))
        close(decomposed.module()(images(2)), make(name).train(training)(images(2)))
    assert counted[0] == counted[1]


@MODES
@EVERY
def test_graph_is_natives(kind, training):
    """Node by node with their arguments: what any pattern of a quantiser or compiler finds in
    native's graph, it finds here."""
    torch._dynamo.reset()
    texts = []
    for name in (kind, "native"):
        graph = program(make(name).train(training), images()).graph
        texts.append(
            [(node.op, str(node.target).replace("_.", "."), str(node.args)) for node in graph.nodes]
        )
    if kind == "act":
        # The names of results that are made in place differ.
        texts = [[(op, target) for op, target, _ in text] for text in texts]
    assert texts[0] == texts[1]


def test_eager_and_compiled_calls_keep_the_operators():
    """The counterpart of all this: whoever does not export gets the kernels."""
    for kind in KINDS:
        torch._dynamo.reset()
        seen: list[str] = []

        def backend(graph, example_inputs, seen=seen):
            seen += targets(graph.graph)
            return graph

        net = make(kind).eval()
        close(torch.compile(net, backend=backend, fullgraph=True)(images()), net(images()))
        # Alone, a batch norm is left to the compiler (BNORM_EXT_COMPILE).
        kept = sum("bnorm_ext.batch_norm_inference" in name for name in seen)
        assert kept == (0 if kind == "converted" else 3)
        with torch.profiler.profile() as profile:
            net(images())
        events = [event.name for event in profile.events()]
        assert events.count("bnorm_ext::batch_norm_inference") == 3
