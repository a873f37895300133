"""The private names of torch that this package uses, and what happens where one is missing.

torch may rename or remove a private name in any release. Each use here has a fallback, so that a
missing name costs speed or turns a feature off with a reason, and breaks nothing else. No module
outside of this package may use a private name of torch. ``tests/packaging/test_compat.py`` removes
each entry of ``NAMES`` in turn and checks the fallback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.lazy import LazyModuleMixin

#: Name -> what happens where it is missing.
NAMES: dict[str, str] = {
    "torch._C._are_functorch_transforms_active": "slower: every call goes through _transforms.py",
    "torch._C._functorch.get_interpreter_stack": "slower: torch.func takes basic operations",
    "torch._C._functorch.TransformType": "slower: torch.func takes basic operations",
    "torch.overrides._get_current_function_mode_stack": "modes see a fused graph's own calls",
    "torch.autograd.forward_ad._current_level": "slower: every call goes through _transforms.py",
    "torch._prims_common.suggest_memory_format": "none: computed here",
    "torch._subclasses.fake_tensor.FakeTensorMode": "fusing knows no shapes",
    "torch.nn.modules.batchnorm._BatchNorm": "none: found as the base of public classes",
    "torch.nn.BatchNorm2d._check_input_dim": "none: checked here",
    "torch.nn.modules.module._global_forward_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_forward_pre_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_backward_hooks": "slower: fused graphs are not run",
    "torch.nn.modules.module._global_backward_pre_hooks": "slower: fused graphs are not run",
    "torch.nn.Module._forward_hooks": "fusing is refused",
    "torch.nn.Module._forward_pre_hooks": "fusing is refused",
    "torch.nn.Module._backward_hooks": "fusing is refused",
    "torch.nn.Module._backward_pre_hooks": "fusing is refused",
    "torch.nn.Module._parameters": "slower: tensors are read by getattr",
    "torch.nn.Module._buffers": "slower: tensors are read by getattr",
    "torch.nn.Module._modules": "slower: children are found by named_modules",
    "torch.nn.Module._call_impl": "fusing is refused; a graph calls the function, not the module",
    "torch.nn.Module._compiled_call_impl": "fusing is refused",
    "torch.compiler._is_exporting_flag": (
        "slower with torch 2.8 to 2.11: torch.compile takes torch's batch norm everywhere"
    ),
    "torch.distributed.distributed_c10d._resolve_process_group": (
        "SyncBatchNorm does not check that all ranks run the same layer"
    ),
}


# --- process groups -------------------------------------------------------------------------------


def process_group_named(name: str) -> Any:
    """The process group with this ``group_name``; None where it cannot be told."""
    if not torch.distributed.is_available():
        return None
    resolve = getattr(torch.distributed.distributed_c10d, "_resolve_process_group", None)
    return None if resolve is None else resolve(name)


# --- export ---------------------------------------------------------------------------------------

_HAS_EXPORTING_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def is_exporting() -> bool:
    """Whether torch.export records what is called.

    torch.compiler.is_exporting says so too, but while Dynamo of torch 2.8 to 2.11 traces for
    torch.compile it is always True. The variable behind it is right there.
    """
    if _HAS_EXPORTING_FLAG:
        exporting: bool = torch.compiler._is_exporting_flag
        return exporting
    return torch.compiler.is_exporting()


# --- transforms -----------------------------------------------------------------------------------


def _always() -> bool:
    return True


#: Whether a torch.func transform is active. Answering True too often is slower but correct:
#: `_transforms` gives the right result without a transform too.
transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _always
)

#: Forward-mode AD is active where ``FORWARD_STATE[FORWARD_LEVEL] >= 0``: its nesting level, -1
#: outside. Read from a dictionary, because a function call is a measurable part of the time of a
#: small batch norm.
FORWARD_LEVEL = "_current_level"
FORWARD_STATE: Mapping[str, Any] = (
    vars(forward_ad) if hasattr(forward_ad, FORWARD_LEVEL) else {FORWARD_LEVEL: 0}
)


def _transforms_of_kind(name: str) -> int | None:
    """How many transforms of torch.func of this kind are active; None where that is unknown."""
    try:
        stack = torch._C._functorch.get_interpreter_stack() or ()
        kind = getattr(torch._C._functorch.TransformType, name)
    except AttributeError:
        return None
    return sum(1 for interpreter in stack if interpreter.key() == kind)


def may_be_forward_over_forward() -> bool:
    """Whether jvp transforms of torch.func are nested; True too where that cannot be determined."""
    count = _transforms_of_kind("Jvp")
    return count is None or count > 1


def is_functionalizing() -> bool:
    """Whether torch.func.functionalize is active, which takes no autograd Function."""
    return bool(_transforms_of_kind("Functionalize"))


# --- modes ----------------------------------------------------------------------------------------

_modes: Callable[[], list[Any]] | None = getattr(
    torch.overrides, "_get_current_function_mode_stack", None
)


def has_function_modes() -> bool:
    """Whether a mode sees the functions of torch that are called, other than the default device."""
    return _modes is not None and any(
        type(mode).__module__ != "torch.utils._device" for mode in _modes()
    )


# --- tensors --------------------------------------------------------------------------------------


def channels_last_or_contiguous(x: Tensor) -> torch.memory_format:
    """The rule of ``at::Tensor::suggest_memory_format`` in C++."""
    orders = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}
    if x.layout is not torch.strided or x.dim() not in orders or x.stride(1) == 0:
        return torch.contiguous_format
    least: Any = 0
    for dim in orders[x.dim()]:
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# torch's own function also takes symbolic sizes, which the one above does not.
try:
    from torch._prims_common import suggest_memory_format as suggest_memory_format
except ImportError:
    suggest_memory_format = channels_last_or_contiguous

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:
    FakeTensorMode = None  # type: ignore[assignment,misc]  # a class or None, by torch's version


@contextmanager
def fake_tensors() -> Iterator[Callable[[Tensor], Tensor] | None]:
    """A context in which operations compute shapes and dtypes only.

    Yields the function that makes a fake tensor of a real one; None where torch has no such mode,
    and operations compute values as usual.
    """
    if FakeTensorMode is None:
        yield None
        return
    # torch logs an operation that fails on fake tensors as an error. Here a failure only means that
    # a shape stays unknown.
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield lambda tensor: mode.from_tensor(tensor, static_shapes=True)
    finally:
        logger.disabled = before


# --- batch norms ----------------------------------------------------------------------------------

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

    AnyBatchNorm = _BatchNorm
else:
    try:
        from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
    except ImportError:
        AnyBatchNorm = next(
            cls for cls in nn.BatchNorm2d.__mro__ if issubclass(nn.SyncBatchNorm, cls)
        )

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def _check_rank(self: nn.Module, input: Tensor) -> None:
    for cls, ranks in _RANKS.items():
        if isinstance(self, cls) and input.dim() not in ranks:
            expected = " or ".join(f"{rank}D" for rank in ranks)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")


class BatchNormBase(AnyBatchNorm):
    """Base of this package's modules; it comes before native's class in their order of bases."""

    # `modules.py` calls this name, because a subclass may override it as it may override native's,
    # and TorchScript compiles the call. Defined here only where native's classes lack it.
    if not hasattr(nn.BatchNorm2d, "_check_input_dim"):
        _check_input_dim = _check_rank


def is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin)
