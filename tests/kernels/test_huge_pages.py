"""Large outputs on the CPU ask the system for huge pages (csrc/cpu/huge_pages.h)."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import bnorm_ext

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel has no transparent huge pages",
)


def advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping under the middle of `tensor` carries MADV_HUGEPAGE's flag."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= middle < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping found")


def check(training: bool) -> None:
    # Above glibc's 32 MB, and in a fresh process, every tensor has a mapping of its own.
    x = torch.randn(40, 8, 256, 256, requires_grad=True)
    assert not advised(x)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = bnorm_ext.batch_norm(x, torch.zeros(8), torch.ones(8), weight, bias, training)
    assert advised(y)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert advised(dx)


@pytest.mark.parametrize("training", [True, False])
def test_large_outputs_are_in_huge_pages(training: bool) -> None:
    """In a process of its own: a heap that has been advised before stays so."""
    code = f"from tests.kernels.test_huge_pages import check; check({training})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
