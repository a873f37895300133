"""The table of tools that the files ``model_tools*.py`` fill, and how one is applied to a net."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Tool = Callable[[nn.Module, Tensor], Tensor]
TOOLS: dict[str, Tool] = {}


def tool(name: str) -> Callable[[Tool], Tool]:
    def register(function: Tool) -> Tool:
        TOOLS[name] = function
        return function

    return register


def apply(name: str, net: nn.Module, x: Tensor) -> Tensor | Exception:
    """What a copy of the net computes after the tool, or what the tool or the call raised."""
    torch.manual_seed(0)
    net = copy.deepcopy(net).eval()
    try:
        return TOOLS[name](net, x.clone()).detach()
    except Exception as error:
        return error
