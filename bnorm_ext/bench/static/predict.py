"""Predicted times of a batch norm in training, by the compiled code of its kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from bnorm_ext.explain import launch_plan, resolve_device

from ..cost_model import FORMATS
from . import roofline
from .compile import listing
from .gpus import Gpu
from .kernels import KERNELS, Counts, Kernel, assumptions, counts_of, instance_of, without_epilogue
from .sass import Function, parse

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def counts(kernel: Kernel, arch: int, act: str = "identity") -> list[Counts]:
    """Of all instances of a kernel; compiles its file where it has not been compiled yet."""
    assumed = assumptions(kernel, act)
    found = (counts_of(f, kernel, assumed) for f in _taken(kernel, arch, plain=act == "identity"))
    return [c for c in found if c is not None]


def _taken(kernel: Kernel, arch: int, plain: bool) -> list[Function]:
    """The functions that calls take, one for each dtype, width and mapping. ``plain``: those that
    are compiled without an epilogue, where there are such."""
    taken: dict[tuple[str, int, str], Function] = {}
    for function in _functions(kernel.file, arch):
        instance = instance_of(function, kernel)
        if instance is not None and (instance not in taken or without_epilogue(function) == plain):
            taken[instance] = function
    return list(taken.values())


@functools.cache
def _functions(file: str, arch: int) -> list[Function]:
    return parse(listing(file, arch))


@functools.cache
def _instance(kernel: Kernel, arch: int, dtype: str, width: int, mapping: str) -> Counts:
    for function in _taken(kernel, arch, plain=True):
        if instance_of(function, kernel) == (dtype, width, mapping):
            found = counts_of(function, kernel, assumptions(kernel))
            assert found is not None
            return found
    raise ValueError(f"no {kernel.name} for {dtype}, {width} elements, {mapping}")


@dataclass(frozen=True)
class Layer:
    """Forward or backward of one batch norm."""

    path: str
    launches: tuple[roofline.Prediction, ...]
    floor: float  # s: the fewest bytes at the rate of a copy

    @property
    def time(self) -> float:
        return sum(launch.time for launch in self.launches)

    @property
    def binds(self) -> str:
        return max(self.launches, key=lambda launch: launch.time).binds


def predict(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, tensors: int, gpu: Gpu
) -> Layer:
    """Without an activation, a residual or a mask. `tensors`: that are read, 1 forward, 2
    backward."""
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[layout])
    plan = launch_plan(x, tensors, resolve_device(gpu.name))
    elements, item, name = math.prod(shape), dtype.itemsize, str(dtype)[6:]
    width = plan["access_bytes"] // item
    mapping = plan["mapping"]

    def of(kernel: str) -> Counts:
        return _instance(_BY_NAME[kernel], gpu.compiled_for, name, width, mapping)

    if plan["path"] == "two_pass":
        first, second = (
            ("statistics_kernel", "normalise_kernel")
            if tensors == 1
            else ("backward_reduce_kernel", "backward_apply_kernel")
        )
        launches: tuple[roofline.Prediction, ...] = (
            roofline.two_pass(gpu, of(first), elements, tensors, item, plan),
            roofline.two_pass(gpu, of(second), elements, tensors + 1, item, plan, tensors),
        )
    else:
        direction = "forward" if tensors == 1 else "backward"
        if plan["on_chip"]:
            counts = of(f"resident_{direction}_kernel")
            launches = (roofline.resident(gpu, counts, elements, tensors + 1, item, plan),)
        else:
            counts = of(f"sweep_{direction}_kernel")
            launches = (roofline.sweeps(gpu, counts, elements, tensors, item, plan),)
    floor = (tensors + 1) * elements * item / gpu.copy + roofline.RAMP
    return Layer(plan["path"], launches, floor)
