"""What tests expect of older versions of torch."""

from __future__ import annotations

import torch


def torch_is_before(major: int, minor: int) -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < (major, minor)
