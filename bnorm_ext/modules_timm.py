"""timm's batch norm with activation on this package's kernels.

``bnorm_ext.modules_timm.BatchNormAct2d`` exists where timm is installed. It is a subclass of timm's
class with the same children ``drop`` and ``act``, so timm's tools (freezing, splitting, folding)
treat it as their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from ._compat.modules import has_global_module_hooks, is_hooked
from .modules import _BatchNormMixin
from .modules_act import _BatchNormActMixin, activation_of

#: Module and name of timm's class. It is recognised by them, because timm need not be installed.
NAME = ("timm.layers.norm_act", "BatchNormAct2d")


class _TimmMixin(_BatchNormActMixin):
    """``act(drop(batch_norm(input)))``, in one call if ``drop`` is ``nn.Identity``."""

    _rebuilding = ("torch.", "torchvision.", "torchao.")  # not timm, whose tools know the class

    def activation(self) -> tuple[str | None, float]:
        children: Any = self  # timm's `act` is a module
        if type(children.drop) is not nn.Identity or is_hooked(children.drop):
            return None, 0.01
        return activation_of(children.act)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        name, slope = self.activation()
        if name is None or has_global_module_hooks():
            children: Any = self
            y: Tensor = children.act(children.drop(_BatchNormMixin.forward(self, input)))
            return y
        return self._normalise(input, None, name, slope)


def _ours(cls: type[nn.Module]) -> Any:
    """The subclass of timm's ``cls``."""
    body = {
        "__module__": __name__,
        "__qualname__": cls.__qualname__,
        "__doc__": f"{NAME[0]}.{NAME[1]} on this package's kernels; see {__name__}.",
        "timms": cls,
        "__init__": cls.__init__,
        "extra_repr": cls.extra_repr,
    }
    return type(cls.__name__, (_TimmMixin, cls), body)


# The cast, because mypy does not take a class of modules for hashable.
ours = cast(Callable[[type[nn.Module]], Any], functools.cache(_ours))


def __getattr__(name: str) -> Any:
    # Pickle finds the class by its name, before it has been made in this process.
    if name != NAME[1]:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from timm.layers.norm_act import BatchNormAct2d as timms

    return ours(timms)
