"""Private names of torch are in one module only, bnorm_ext/_compat.py."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext import _compat

PACKAGE = Path(bnorm_ext.__file__).resolve().parent

#: Private names of torch that another module may write, and why.
ALLOWED = {
    # TorchScript compiles the call, and a subclass may override it: it goes by its name.
    ("modules.py", "_check_input_dim"),
}


@functools.cache
def _torchs_names() -> frozenset[str]:
    """What modules, tensors, tracers and the modules of torch itself have with one underscore."""
    objects = (
        nn.BatchNorm2d(1), torch.ones(1), torch.fx.Tracer(), torch.fx.Graph(), torch,
        torch.autograd.Function, torch._C, torch._C._functorch, torch.autograd.forward_ad,
        torch.nn.modules.module,
        torch.nn.modules.batchnorm, torch.nn.modules.conv, torch.fx.node, torch.fx.proxy,
    )  # fmt: skip
    names = {name for held in objects for name in (*dir(held), *getattr(held, "__dict__", ()))}
    return frozenset(filter(_is_private, names)) | {"_orig_mod", "_class_changed"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> set[str]:
    """Private names of torch in Python source: imported from torch, reached through a name that is
    imported from torch, or an attribute, a method or a text that is one of an object of torch.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    of_torch: set[str] = set()  # names in the source that are modules or objects of torch
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name.split(".")
                if path[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    found |= set(filter(_is_private, path))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [alias.name for alias in node.names]
            if node.level == 0:
                found |= set(filter(_is_private, [*node.module.split("."), *names]))
                of_torch |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            through_torch = isinstance(base, ast.Name) and base.id in of_torch
            if through_torch or node.attr in _torchs_names():
                found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            methods = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
            found |= methods & set(filter(_is_private, dir(nn.BatchNorm2d)))
        elif isinstance(node, ast.Constant) and node.value in _FOUND_BY_TEXT:
            found.add(node.value)
    return found


_FOUND_BY_TEXT = frozenset(
    {"_call_impl", "_compiled_call_impl", "_orig_mod", *filter(_is_private, vars(nn.Module()))}
)


@pytest.mark.parametrize(
    "path",
    [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in ("bench", "_compat.py")
    ],
)
def test_private_names_of_torch_are_in_one_module(path):
    found = {(path, name) for name in private_names((PACKAGE / path).read_text())}
    assert found <= ALLOWED


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.nn.modules.batchnorm import _BatchNorm", "_BatchNorm"),
        ("from torch._subclasses import fake_tensor", "_subclasses"),
        ("import torch._dynamo", "_dynamo"),
        ("import torch\ntorch._something_new()", "_something_new"),
        ("from torch import nn\nnn.modules.conv._ConvNd", "_ConvNd"),
        ("def f(module): return module._buffers", "_buffers"),
        ("def f(module): return vars(module)['_modules']", "_modules"),
        ("class A:\n    def _call_impl(self): pass", "_call_impl"),
    ],
)
def test_a_private_name_is_seen(source, name):
    assert name in private_names(source)


def test_what_the_one_module_uses_is_in_its_table():
    listed = {part for name in _compat.NAMES for part in name.split(".") if _is_private(part)}
    own = {"_called", "_orig_mod", "_C", "_functorch", "_class_changed"}  # _orig_mod: see there
    used = private_names((PACKAGE / "_compat.py").read_text())
    assert used - own <= listed
    for name in (name.rpartition(".")[2] for name in _compat.NAMES):
        assert len(re.findall(rf"\b{name}\b", (PACKAGE / "_compat.py").read_text())) > 1
