"""The implementations that are measured: bnorm_ext, and torch in several variants.

A provider makes a `Layer` from a case, or raises `Unavailable` with the reason why it cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bnorm_ext

from .cases import Case
from .correct import EPS, MOMENTUM, Inputs
from .options import first_line


class Unavailable(Exception):
    """A provider cannot run a case; the text is the reason, in one line."""


@dataclass
class Layer:
    """One batch norm with parameters and buffers of its own."""

    forward: Callable[[Tensor, Tensor | None], Tensor]  #: takes x and residual
    weight: Tensor  #: (C,)
    bias: Tensor  #: (C,)
    buffers: Callable[[], tuple[Tensor, Tensor]]  #: current running mean and variance
    consumes_input: bool = False  #: whether forward overwrites x


class Provider:
    """Base of all providers."""

    name: str  #: in tables and for --provider
    devices: tuple[str, ...] = ("cpu", "cuda")
    ops: tuple[str, ...] = ("bn", "bn_relu", "bn_add_relu")

    def version(self) -> str:
        """The version of the package. Raises Unavailable if it cannot be imported."""
        return str(torch.__version__)

    def layer(self, case: Case, inputs: Inputs) -> Layer:
        self.version()
        if inputs.x.device.type not in self.devices:
            raise Unavailable(f"{self.name} is for {', '.join(self.devices)}")
        if case.op not in self.ops:
            raise Unavailable(f"{self.name} has no {case.op}")
        return self.make(case, inputs)

    def make(self, case: Case, inputs: Inputs) -> Layer:
        raise NotImplementedError


def _parameters(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of running mean, running variance, weight and bias; the last two require gradients."""
    return (
        i.running_mean.clone(),
        i.running_var.clone(),
        i.weight.clone().requires_grad_(),
        i.bias.clone().requires_grad_(),
    )


def functional_layer(
    function: Callable[..., Tensor], case: Case, i: Inputs, *, consumes_input: bool = False
) -> Layer:
    """A layer that calls ``function(x, residual, running_mean, running_var, weight, bias,
    training)``."""
    mean, var, weight, bias = _parameters(i)

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        return function(x, residual, mean, var, weight, bias, case.training)

    return Layer(forward, weight, bias, lambda: (mean, var), consumes_input)


def module_layer(
    module: Any,
    case: Case,
    i: Inputs,
    forward: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    *,
    consumes_input: bool = False,
) -> Layer:
    """A layer that calls a module with the parameters and buffers of the inputs."""
    module = module.to(i.x.device, i.weight.dtype).train(case.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(i, name))
    return Layer(
        forward or (lambda x, residual: module(x)),
        module.weight,
        module.bias,
        lambda: (module.running_mean, module.running_var),
        consumes_input,
    )


# In place, as in the nets of torchvision: `out += identity`, `nn.ReLU(inplace=True)`.
def _activated(op: str, y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None:
        y += residual
    return y if op == "bn" else F.relu(y, inplace=True)


class Ours(Provider):
    name = "bnorm_ext"

    def version(self) -> str:
        return bnorm_ext.__version__

    def make(self, case: Case, i: Inputs) -> Layer:
        info = bnorm_ext.build_info()
        if info["cpu_capability"] is None:
            raise Unavailable("BNORM_EXT_DISABLE is set: every call goes to torch")
        if i.x.is_cuda and not info["cuda_kernels"]:
            raise Unavailable("compiled without CUDA kernels: CUDA tensors take torch's path")
        call: Callable[..., Tensor] = bnorm_ext.batch_norm
        if case.op == "bn":
            return functional_layer(
                lambda x, _, m, v, w, b, t: call(x, m, v, w, b, t, MOMENTUM, EPS), case, i
            )
        return functional_layer(
            lambda x, r, m, v, w, b, t: call(
                x, m, v, w, b, t, MOMENTUM, EPS, residual=r, act="relu"
            ),
            case,
            i,
        )


class Unfused(Ours):
    """The same batch norm followed by torch's addition and activation: shows the gain of fusing."""

    name = "bnorm_ext-unfused"
    ops = ("bn_relu", "bn_add_relu")

    def make(self, case: Case, i: Inputs) -> Layer:
        layer = super().make(replace(case, op="bn"), i)
        normalise, op = layer.forward, case.op
        layer.forward = lambda x, residual: _activated(op, normalise(x, None), residual)
        return layer


class Torch(Provider):
    name = "torch"

    def make(self, case: Case, i: Inputs) -> Layer:
        op = case.op
        return functional_layer(
            lambda x, r, m, v, w, b, t: _activated(
                op, F.batch_norm(x, m, v, w, b, t, MOMENTUM, EPS), r
            ),
            case,
            i,
        )


class TorchWithoutCudnn(Provider):
    """torch without cuDNN. Backward uses the implementation that forward chose."""

    name = "torch-nocudnn"
    devices = ("cuda",)

    def make(self, case: Case, i: Inputs) -> Layer:
        op = case.op
        return functional_layer(
            lambda x, r, m, v, w, b, t: _activated(
                op, torch.batch_norm(x, w, b, m, v, t, MOMENTUM, EPS, False), r
            ),
            case,
            i,
        )


class Compiled(Provider):
    """torch.compile of what the provider `torch` runs, compiled once for each group of cases.

    `allowance` is the number of seconds that a run may spend on compiling; cases after that are
    left out.
    """

    name = "torch.compile"

    def __init__(self) -> None:
        self.allowance = float("inf")
        self.spent = 0.0
        self._group: object = None
        self._function: Callable[..., Tensor] | None = None
        self._failure: str | None = None

    def make(self, case: Case, i: Inputs) -> Layer:
        if case.group != self._group:
            self._group, self._function, self._failure = case.group, None, None
            if self.spent >= self.allowance:
                self._failure = (
                    f"compiling has taken {self.spent:.0f} s already, and this run allows "
                    f"{self.allowance:.0f}: --provider torch.compile measures it"
                )
            else:
                start = time.perf_counter()
                try:
                    self._function = self._compile(case, i)
                except Exception as error:  # for instance, there is no compiler
                    self._failure = first_line(error)
                self.spent += time.perf_counter() - start
        if self._function is None:
            raise Unavailable(self._failure)
        return functional_layer(self._function, case, i)

    @staticmethod
    def _compile(case: Case, i: Inputs) -> Callable[..., Tensor]:
        torch._dynamo.reset()  # otherwise dynamo stops compiling after eight shapes
        # Gradients are computed several times from one forward pass, so the first backward must not
        # overwrite its activations.
        torch._functorch.config.donated_buffer = False
        op = case.op

        def function(
            x: Tensor, r: Tensor | None, m: Tensor, v: Tensor, w: Tensor, b: Tensor, t: bool
        ) -> Tensor:
            return _activated(op, F.batch_norm(x, m, v, w, b, t, MOMENTUM, EPS), r)

        compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, dynamic=False)
        mean, var, weight, bias = _parameters(i)
        x = i.x.detach().requires_grad_(case.training)
        r = None if i.residual is None else i.residual.detach().requires_grad_(case.training)
        with torch.set_grad_enabled(case.training):
            y = compiled(x, r, mean, var, weight, bias, case.training)
        if case.training:
            torch.autograd.grad(y, [x], i.dy)
        return compiled


#: The provider that ratios are relative to.
BASELINE = Torch.name
