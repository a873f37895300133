"""Runs exported files where there is no bnorm_ext: ``load_exported.py FOLDER``.

``inputs.pt`` in the folder holds the batches; for each file, ``<file>.results`` is written: the
output for each batch one after the other, then the buffers, where the file has any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["bnorm_ext"] = None  # type: ignore[assignment]  # importing it raises ImportError

import torch  # noqa: E402  (after the import is barred, whoever would ask for it)


def onnx(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.float().numpy()})[0])


def load(path: Path) -> Callable[[Any], Any]:
    if path.suffix == ".onnx":
        return onnx(path)
    if path.suffix == ".ts":
        return torch.jit.load(path)
    if path.name.startswith("AOTInductor"):
        return torch._inductor.aoti_load_package(str(path))
    return torch.export.load(path).module()


def main(folder: Path) -> None:
    batches = torch.load(folder / "inputs.pt")
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".onnx", ".ts", ".pt2")):
        called = load(path)
        results: dict[str, Any] = {"y": [called(x).detach().clone() for x in batches]}
        if isinstance(called, torch.nn.Module):
            results["buffers"] = {n: b.detach().clone() for n, b in called.named_buffers()}
        torch.save(results, f"{path}.results")
    # Neither the package nor its operators came in through a file.
    assert not [name for name in sys.modules if name.startswith("bnorm_ext.")]
    assert not hasattr(torch.ops.bnorm_ext, "batch_norm_inference")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
