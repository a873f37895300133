"""Private names of torch: used in one module only, and what happens where one is missing."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import bnorm_ext
from bnorm_ext import _compat, _load

PACKAGE = Path(bnorm_ext.__file__).resolve().parent

compiled_only = pytest.mark.skipif(
    _load.DISABLED, reason="BNORM_EXT_DISABLE=1: there are no operators"
)

# --- one module only ------------------------------------------------------------------------------

#: Private names of torch that another module may write, and why.
ALLOWED = {
    # TorchScript compiles the call, and a subclass may override it: it goes by its name.
    ("modules.py", "_check_input_dim"),
    ("distributed/module.py", "_check_input_dim"),
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
        if path.relative_to(PACKAGE).parts[0] not in ("bench", "_compat")
    ],
)
def test_private_names_of_torch_are_in_one_package(path):
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
    source = "\n".join(path.read_text() for path in sorted((PACKAGE / "_compat").glob("*.py")))
    assert private_names(source) - own <= listed
    for name in (name.rpartition(".")[2] for name in _compat.NAMES):
        assert len(re.findall(rf"\b{name}\b", source)) > 1


# --- one name missing -----------------------------------------------------------------------------

# The name is renamed in all of torch, as another release might do: torch itself goes on. What C++
# defines is renamed as soon as it is there.
RENAME = """
import importlib.machinery, re, sys
name = re.compile(r"\\b{name}\\b")
load = importlib.machinery.SourceFileLoader.get_code

def get_code(self, fullname):
    holder = sys.modules.get("torch._C")
    for part in {parts!r}:
        holder = getattr(holder, part, None)
    if {in_c} and hasattr(holder, "{name}"):
        holder.{name}_renamed = holder.{name}
        del holder.{name}
    # torch.distributed takes it from there.
    c10d = getattr(sys.modules.get("torch._C"), "_distributed_c10d", None)
    if hasattr(c10d, "{name}"):
        c10d.{name}_renamed = c10d.{name}
    if fullname.split(".")[0] == "torch":
        text = self.get_data(self.path)
        if b"{name}" in text:
            renamed = name.sub("{name}_renamed", text.decode())
            return compile(renamed, self.path, "exec", dont_inherit=True)
    return load(self, fullname)

importlib.machinery.SourceFileLoader.get_code = get_code
import torch
"""
USE = """
import copy, warnings
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)


def is_missing(path):
    held = torch
    *parts, last = path.split(".")[1:]
    for part in parts:
        held = getattr(held, part, None)
    return not hasattr(held() if held is nn.Module else held, last)


assert is_missing({path!r})
import bnorm_ext


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return self.relu(self.bn2(y) + y)


def step(net, x):
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    net.eval()
    with torch.no_grad():
        y = net(x)
    net.train()
    return [loss.detach(), y, *(t.detach() for t in net.state_dict().values())]


def compare(net, expected):
    for a, b in zip(step(net, x), expected, strict=True):
        torch.testing.assert_close(a, b)


native = Block().double()
for p in native.parameters():
    nn.init.normal_(p)
x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
converted = bnorm_ext.convert_batchnorm(copy.deepcopy(native))
fused, report = bnorm_ext.fuse_batchnorm_act(copy.deepcopy(native))
expected = step(copy.deepcopy(native), x)
assert isinstance(converted.bn, bnorm_ext.BatchNorm2d)
compare(copy.deepcopy(converted), expected)
compare(copy.deepcopy(fused), expected)

# A change of the net is followed, fused or not.
fused.relu = nn.Tanh()
native.relu = nn.Tanh()
compare(fused, step(copy.deepcopy(native), x))

# Transforms: of a function, over and over.
f = lambda x: bnorm_ext.batch_norm(x, None, None, training=True).pow(3).sum()
g = lambda x: nn.functional.batch_norm(x, None, None, training=True).pow(3).sum()
small = torch.randn(3, 2, 2, dtype=torch.float64)
for transform in (torch.func.grad, lambda f: torch.func.hessian(f)):
    torch.testing.assert_close(transform(f)(small), transform(g)(small))
second = lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(small)
torch.testing.assert_close(second(f), torch.func.jacrev(torch.func.jacrev(g))(small))
with torch.autograd.forward_ad.dual_level():
    dual = torch.autograd.forward_ad.make_dual(small, torch.ones_like(small))
    tangents = [torch.autograd.forward_ad.unpack_dual(h(dual)).tangent for h in (f, g)]
    torch.testing.assert_close(*tangents)

# Errors are native's.
for cls in (nn.BatchNorm2d, bnorm_ext.BatchNorm2d):
    try:
        cls(3)(torch.randn(2, 3))
    except ValueError as error:
        assert str(error) == "expected 4D input (got 2D input)", error
    else:
        raise AssertionError("2D input was taken")

# The layouts that the compiler is told are those that the kernels write.
image = torch.randn(2, 3, 4, 5)
for base in (image, image.to(memory_format=torch.channels_last)):
    for t in (base, base[:, :, ::2], base[:, :2], base.transpose(2, 3)):
        given = t, None, None, None, None, None, None, 0.1, 1e-5
        real = torch.ops.bnorm_ext.batch_norm_training(*given)[0]
        fake = torch.ops.bnorm_ext.batch_norm_training(
            torch.empty_strided(t.shape, t.stride(), device="meta"), *given[1:]
        )[0]
        assert real.stride() == fake.stride(), (t.stride(), real.stride(), fake.stride())

print("fused:", len(report.fused))
print("reasons:", report.refused + report.not_traced)
hooked = bnorm_ext._compat.modules.has_global_module_hooks()
print("runs a graph:", bool(report.fused) and not hooked)
"""


def run_without(path: str) -> str:
    *holder, name = path.split(".")
    filled = {
        "{name}": name,
        "{parts!r}": repr(holder[2:]),
        "{in_c}": repr(holder[:2] == ["torch", "_C"]),
        "{path!r}": repr(path),
    }
    code = RENAME + USE
    for hole, text in filled.items():
        code = code.replace(hole, text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outputs(request):
    """`run_without` of every name that is tested, two at a time, since each imports torch anew."""
    paths = [
        item.callspec.params["path"]
        for item in request.session.items
        if "outputs" in getattr(item, "fixturenames", ())
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run_without, path) for path in paths}
        pool.shutdown(cancel_futures=True)


@compiled_only
@pytest.mark.parametrize("path", _compat.NAMES)
def test_without_a_private_name(path, outputs):
    """Imports, trains, differentiates and fuses, or says why it does not fuse."""
    output = outputs[path].result()
    refused = "fusing is refused" in _compat.NAMES[path]
    assert ("fused: 0" if refused else "fused: 2") in output
    assert ("reasons: []" in output) is not refused
    if refused:
        assert f"with torch {torch.__version__}" in output
    graphs_run = not refused and "_global_" not in path
    assert f"runs a graph: {graphs_run}" in output
