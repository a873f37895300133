"""Providers for the batch norms of other packages, and the list of all providers."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .correct import EPS, MOMENTUM, Inputs
from .options import first_line
from .providers import (
    Compiled,
    Layer,
    Ours,
    Provider,
    Torch,
    TorchWithoutCudnn,
    Unavailable,
    Unfused,
    functional_layer,
    module_layer,
)


class Package(Provider):
    """A provider from another package. Unavailable if that cannot be imported."""

    module = ""

    def version(self) -> str:
        self.imported()
        try:
            return importlib.metadata.version(self.module.partition(".")[0])
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def imported(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except Exception as error:  # compiled for another torch, without a GPU, ...
            raise Unavailable(first_line(error)) from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


class Apex(Package):
    """apex.parallel.SyncBatchNorm in one process; its channels_last is contiguous (N, H, W, C)."""

    name, module, devices = "apex", "apex.parallel", ("cuda",)

    def make(self, case: Case, i: Inputs) -> Layer:
        cls = self.imported().SyncBatchNorm
        fused = {} if case.op == "bn" else {"fuse_relu": True}
        if fused and not _takes(cls.__init__, "fuse_relu"):
            raise Unavailable(f"this apex has no {case.op}")
        last = case.layout == "channels_last"
        module = cls(case.shape[1], eps=EPS, momentum=MOMENTUM, channel_last=last, **fused)

        def forward(x: Tensor, residual: Tensor | None) -> Tensor:
            given = [x] if residual is None else [x, residual]
            given = [t.movedim(1, -1) for t in given] if last else given
            y: Tensor = module(*given)
            return y.movedim(-1, 1) if last else y

        return module_layer(module, case, i, forward)


class InPlaceABN(Package):
    name, module, devices, ops = "inplace_abn", "inplace_abn", ("cuda",), ("bn",)

    def make(self, case: Case, i: Inputs) -> Layer:
        cls = self.imported().InPlaceABN
        module = cls(case.shape[1], eps=EPS, momentum=MOMENTUM, activation="identity")
        return module_layer(module, case, i, consumes_input=True)


class Timm(Package):
    name, module, ops = "timm", "timm.layers", ("bn", "bn_relu")

    def make(self, case: Case, i: Inputs) -> Layer:
        if len(case.shape) != 4:
            raise Unavailable("BatchNormAct2d takes 4 dimensions")
        cls = self.imported().BatchNormAct2d
        act = case.op == "bn_relu"
        return module_layer(cls(case.shape[1], EPS, MOMENTUM, apply_act=act), case, i)


class Attorch(Package):
    name, module, devices = "attorch", "attorch", ("cuda",)

    def make(self, case: Case, i: Inputs) -> Layer:
        if len(case.shape) not in (2, 3, 4):
            raise Unavailable("attorch takes 2 to 4 dimensions")
        imported = self.imported()
        cls = imported.BatchNorm2d if len(case.shape) == 4 else imported.BatchNorm1d
        fused = {} if case.op == "bn" else {"act_func": "relu"}
        if fused and not _takes(cls.__init__, "act_func"):
            raise Unavailable(f"this attorch has no {case.op}")
        module = cls(case.shape[1], EPS, MOMENTUM, **fused)
        forward = None if case.op != "bn_add_relu" else lambda x, residual: module(x, residual)
        return module_layer(module, case, i, forward)


class FlagGems(Package):
    """The Triton kernels of FlagGems, which has them in place of torch's."""

    name, module, devices, ops = "flag_gems", "flag_gems.ops.batch_norm", ("cuda",), ("bn",)

    def make(self, case: Case, i: Inputs) -> Layer:
        kernels = self.imported()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Any:
                y, mean, rstd = kernels.batch_norm(x, weight, bias, *rest, MOMENTUM, EPS)
                ctx.save_for_backward(x, weight, mean, rstd)
                return y

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
                x, weight, mean, rstd = ctx.saved_tensors
                grads = kernels.batch_norm_backward(
                    dy, x, weight, None, None, mean, rstd, True, EPS, [True] * 3
                )
                return (*grads, None, None, None)

        def call(x: Tensor, _: Any, mean: Tensor, var: Tensor, *parameters: Any) -> Tensor:
            weight, bias, training = parameters
            y: Tensor = Function.apply(x, weight, bias, mean, var, training)
            return y

        return functional_layer(call, case, i)


ALL: tuple[type[Provider], ...] = (
    Ours, Unfused, Torch, TorchWithoutCudnn, Compiled, Apex, InPlaceABN, Timm, Attorch, FlagGems,
)  # fmt: skip
NAMES = tuple(cls.name for cls in ALL)


def make(names: Sequence[str]) -> list[Provider]:
    by_name = {cls.name: cls for cls in ALL}
    return [by_name[name]() for name in names]


def absent(names: Sequence[str], device: str) -> list[str]:
    """Those of the providers that cannot be measured on this device, each with the reason."""
    found = []
    for provider in make(names):
        if device not in provider.devices:
            found.append(f"{provider.name} is for {', '.join(provider.devices)}")
            continue
        try:
            provider.version()
        except Unavailable as why:
            found.append(f"{provider.name}: {why}")
    return found


def available(device: str, ops: Collection[str] = ("bn",)) -> list[str]:
    """The names of the providers that can be imported and support this device and all of these
    operations."""
    found = []
    for cls in ALL:
        if device in cls.devices and set(ops) <= set(cls.ops):
            try:
                cls().version()
            except Unavailable:
                continue
            found.append(cls.name)
    return found
