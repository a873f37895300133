"""Functions of torch that a forward calls, while it is traced, with real tensors only: parameters,
buffers, constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from .guards import Trait
from .process_state import DRAWS, RANDOM_FUNCTIONS

if TYPE_CHECKING:
    from .tracer import Tracer

# The attributes and methods of a tensor that describe it without reading its values.
_DESCRIBING = frozenset(
    {
        "shape", "dtype", "device", "layout", "ndim", "names", "requires_grad", "is_leaf",
        "grad_fn",
        "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn", "is_mps",
        "itemsize", "nbytes", "output_nr", "_version", "size", "dim", "ndimension", "numel",
        "nelement", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "is_signed", "get_device", "type", "data_ptr", "storage_offset", "__len__", "__hash__",
        "__repr__", "__format__",
    }
)  # fmt: skip

# Of these, what a copy of a tensor has in common with it.
_STAYING = _DESCRIBING - {
    "grad_fn", "is_leaf", "output_nr", "_version", "data_ptr", "__hash__", "__repr__", "__format__",
    "names",
}  # fmt: skip

# What makes Python numbers of a tensor; those with underscores have to return one at once.
_NUMBERS = frozenset({"__bool__", "__int__", "__float__", "__index__", "__complex__"})
_READING = _NUMBERS | {"item", "tolist", "numpy"}


class TensorCalls(TorchFunctionMode):
    """Intercepts torch functions that are called with real tensors only.

    Where one of them is a parameter or buffer of the root, the call is recorded in the graph.
    Otherwise its result would be frozen, and later changes of the parameter would have no effect.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.paused = False  # while tracing looks at tensors itself
        root = tracer.root
        held = (*root.named_parameters(), *root.named_buffers())
        self.paths = {id(tensor): tuple(name.split(".")) for name, tensor in held}
        own = [tensor for _, tensor in held]
        attributes = [
            t for module in root.modules() for t in vars(module).values() if isinstance(t, Tensor)
        ]
        # Results of autograd: the copy that is traced has the very same.
        self.own = {id(tensor) for tensor in (*own, *(t for t in attributes if not t.is_leaf))}
        self.constants = {id(tensor) for tensor in attributes}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or any(issubclass(cls, fx.Proxy) for cls in types):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute in _DESCRIBING or id(args[0]) not in self.own:
                return self._described(args[0], attribute, False, func(*args, **kwargs))
            if name == "__set__":
                raise self.tracer.fault(f"assigns to the attribute {attribute} of a tensor")
            return getattr(self._value(args[0]), attribute)
        if name.partition(".")[0] in RANDOM_FUNCTIONS:  # an operator's name is `rand.default`
            raise self.tracer.fault(DRAWS)
        if name in _DESCRIBING:
            return self._described(args[0], name, True, func(*args, **kwargs))
        if (name in _READING and id(args[0]) in self.constants) or (
            name in _NUMBERS and id(args[0]) in self.own
        ):
            raise self.tracer.fault(
                "makes a Python number of a parameter, a buffer or another tensor that it holds, "
                "which tracing would freeze"
            )
        if any(id(tensor) in self.own for tensor in _tensors([args, kwargs])):
            if is_tensor_method_or_property(func):
                return self.tracer.create_proxy("call_method", name, args, kwargs)
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)

    def _described(self, tensor: Tensor, name: str, is_method: bool, value: Any) -> Any:
        """Returns the value, and notes it if it is that of a parameter or buffer."""
        path = self.paths.get(id(tensor))
        if path is not None and name in _STAYING:
            now = getattr(tensor, name)
            self.tracer.traits.append(Trait(path, name, is_method, now() if is_method else now))
        return value

    def _value(self, tensor: Tensor) -> fx.Proxy:
        return self.tracer.proxy(self.tracer.create_arg(tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
