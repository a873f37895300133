"""The steps that `bench.train` measures: the variants of a net, and what one step does with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnorm_ext

from .providers import Unavailable

VARIANTS = ("native", "converted", "fused")


def convert(variant: str, model: nn.Module) -> nn.Module:
    """A copy of the model in that variant. Raises Unavailable if it has nothing to fuse."""
    model = copy.deepcopy(model)
    if variant == "native":
        return model
    if variant == "converted":
        return bnorm_ext.convert_batchnorm(model)
    model, what = bnorm_ext.fuse_batchnorm_act(model)
    if not what.fused:
        raise Unavailable("there is nothing to fuse in this model")
    return model


def training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    amp: torch.dtype | None,
    mode: str | None,
) -> Callable[[], None]:
    """A function that takes one training step (forward, loss, backward, SGD) and waits for the
    device. amp: the dtype of autocast; mode: of torch.compile; None for neither."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    device = images.device.type
    scaler = torch.amp.GradScaler(device, enabled=amp == torch.float16)
    call: Any = model if mode is None else torch.compile(model, mode=mode)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, amp, enabled=amp is not None):
            loss = F.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def inference_step(
    model: nn.Module, images: Tensor, *, amp: torch.dtype | None, mode: str | None
) -> Callable[[], None]:
    """A function that takes one forward pass without autograd and waits for the device. amp and
    mode: as in `training_step`."""
    device = images.device.type
    call: Any = model if mode is None else torch.compile(model, mode=mode)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(device, amp, enabled=amp is not None):
            call(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return step
