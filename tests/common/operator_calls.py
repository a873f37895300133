"""Direct calls of torch.ops.bnorm_ext.* with random arguments, right and wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bnorm_ext  # noqa: F401  (registers the operators)
from tests.common.cases import DTYPES, accumulation_type, generator
from tests.common.fused_cases import ACTS

ops = torch.ops.bnorm_ext
SHAPES = [
    (4, 5, 3, 2), (2, 1), (3, 2), (1, 3, 2), (7, 1, 5), (2, 17, 3), (3, 33, 1, 7), (2, 7, 3, 2, 5),
    (16, 8), (2, 3, 65), (4, 16, 4, 4), (1, 8, 2, 2), (5, 64), (2, 2, 2, 2, 2, 2),
]  # fmt: skip
EMPTY = [(0, 5), (0, 3, 2, 2), (4, 5, 0), (4, 0), (2, 0, 3)]
OTHER_DTYPES = [
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn,
]  # fmt: skip
LIKE_X = ("x", "dy", "residual")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
#: (C,) of the accumulation type: statistics and sums of other passes.
MADE = ("mean", "rstd", "mean_dy", "mean_dy_xhat")
NAMES = [
    "batch_norm_training", "batch_norm_inference", "batch_norm_backward", "batch_norm_stats",
    "batch_norm_merge_stats", "batch_norm_apply", "batch_norm_backward_reduce",
    "batch_norm_backward_apply",
]  # fmt: skip

Arguments = dict[str, Any]


def parameters(name: str) -> list[Any]:
    """As the schema has them."""
    return list(getattr(ops, name).default._schema.arguments)


class Maker:
    """Makes the call of one number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}:{number}")
        self.name = self.random.choice(NAMES)
        self.dtype = self.random.choice(DTYPES)
        self.kind = self.random.choice([self.dtype, accumulation_type(self.dtype)])
        self.shape = self.random.choice(EMPTY if self.random.random() < 0.08 else SHAPES)
        self.changes: list[str] = []
        #: Of the forward pass that left the mask.
        self.made_mask: Tensor | None = None
        self.made_residual: Tensor | None = None
        self.made_act = ""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        seed = self.random.randrange(1 << 30)
        return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)

    def mean(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Alone, or followed by what its rounding left, which is as small here as it is there."""
        mean = self.normal(shape, dtype)
        return self.random.choice([mean, torch.stack([mean, mean * 1e-8])])

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.random.random() < 0.7 else None

    def good(self) -> Arguments:
        train, C = self.random.random() < 0.5, self.shape[1]

        def vector(dtype: torch.dtype) -> Tensor:
            return self.normal((C,), dtype)

        has_buffers = self.random.random() < 0.7
        merging = self.name == "batch_norm_merge_stats"
        backward = self.name == "batch_norm_backward"
        make: dict[str, Callable[[], Any]] = {
            "x": lambda: self.normal(self.shape, self.dtype),
            "dy": lambda: self.normal(self.shape, self.dtype),
            "residual": lambda: self.maybe(lambda: self.normal(self.shape, self.dtype)),
            "weight": lambda: self.maybe(lambda: vector(self.kind)),
            "bias": lambda: self.maybe(lambda: vector(self.kind)),
            "running_mean": lambda: vector(self.kind),
            "running_var": lambda: vector(self.kind).abs() + 0.5,
            "num_batches_tracked": lambda: self.maybe(lambda: torch.tensor(3)),
            "mean": lambda: self.mean((C,), accumulation_type(self.dtype)),
            "rstd": lambda: vector(accumulation_type(self.dtype)).abs() + 0.5,
            "mean_dy": lambda: vector(accumulation_type(self.dtype)),
            "mean_dy_xhat": lambda: vector(accumulation_type(self.dtype)),
            "mask": lambda: None,
            "momentum": lambda: self.random.choice([0.1, 0.1, 1.0, 0.0]),
            "eps": lambda: 1e-5,
            "act": lambda: self.random.choice(ACTS),
            "negative_slope": lambda: 0.1,
            "save_mask": lambda: self.random.random() < 0.3,
            "train": lambda: train,
            "any_layout": lambda: self.random.random() < 0.2,
            "output_mask": lambda: tuple(self.random.random() < 0.8 for _ in range(4)),
            "dtype": lambda: self.dtype,
        }
        if merging:
            W = self.random.choice([1, 2, 3])
            make |= {
                "mean": lambda: self.normal((W, C), torch.float64),
                "var": lambda: self.normal((W, C), torch.float64).abs(),
                "count": lambda: torch.randint(2, 9, (W,), generator=generator(W)).double(),
            }
        given = {p.name: make[p.name]() for p in parameters(self.name)}
        optional = self.name in ("batch_norm_training", "batch_norm_merge_stats")
        if (optional and not has_buffers) or (backward and train):
            given |= {"running_mean": None, "running_var": None}
        if backward and not train:
            given |= {"mean": None, "rstd": None}
        piecewise = given.get("act") in ("relu", "relu6", "leaky_relu")
        if "mask" in given and piecewise and self.random.random() < 0.5:
            given["mask"] = self.mask(given)
        return given

    def mask(self, given: Arguments) -> Tensor:
        """What forward leaves for this backward."""
        one = torch.ones(self.shape[1], dtype=accumulation_type(self.dtype))
        mean, rstd = (given[n] if given[n] is not None else one for n in ("mean", "rstd"))
        if given.get("train") is False:
            mean = given["running_mean"].to(one.dtype)
            rstd = (given["running_var"].double() + given["eps"]).rsqrt().to(one.dtype)
        self.made_residual = self.normal(self.shape, self.dtype)
        self.made_act = given["act"]
        args = (given["x"], self.made_residual, given["weight"], given["bias"], mean, rstd)
        mask: Tensor = ops.batch_norm_apply(*args, self.made_act, given["negative_slope"], True)[1]
        self.made_mask = mask
        return mask

    # ---- Changes --------------------------------------------------------------------------------

    def spoiled(self) -> Arguments:
        """The good call with up to two arguments changed, which may or may not make it a wrong
        one."""
        given = self.good()
        changes = min(len(given), self.random.choice([0, 1, 1, 1, 2]))
        for name in self.random.sample(list(given), changes):
            value = given[name]
            if isinstance(value, Tensor):
                given[name] = self.other_tensor(name, value, given)
            else:
                given[name] = self.other_value(name, value)
        return given

    def other_value(self, name: str, value: Any) -> Any:
        C = self.shape[1]
        choices: dict[str, list[Any]] = {
            "eps": [0.0, -1.0, float("nan"), float("inf"), None, "1", 1],
            "momentum": [None, float("nan"), 2.0, "0.1"],
            "act": ["", "gelu", "Relu", None, 3, *ACTS],
            "negative_slope": [float("nan"), -1.0, None],
            "save_mask": [True, None, 2],
            "train": [not value, None],
            "any_layout": [True],
            "output_mask": [(True,) * 3, (False,) * 4, (True,) * 4, None],
            "dtype": [*DTYPES, torch.int64, torch.complex64, None],
        }
        absent = [torch.ones(C), torch.ones(C + 1), torch.ones(self.shape).byte(), 1.0, [1.0]]
        new = self.random.choice(choices.get(name, absent))
        self.changes.append(f"{name}: {new!r}")
        return new

    def other_tensor(self, name: str, t: Tensor, given: Arguments) -> Any:
        kinds = [
            "none", "shape", "shape", "dtype", "dtype", "meta", "sparse", "storage", "alias",
            "alias", "within", "expanded", "strided", "negated", "requires_grad", "number",
        ]  # fmt: skip
        kind = self.random.choice(kinds)
        new = getattr(self, f"_{kind}")(t, given)
        self.changes.append(f"{name}: {kind}")
        return new

    def _none(self, t: Tensor, given: Arguments) -> None:
        return None

    def _number(self, t: Tensor, given: Arguments) -> Any:
        return self.random.choice([1.0, "x", [1.0, 2.0]])

    def _shape(self, t: Tensor, given: Arguments) -> Tensor:
        d = self.random.randrange(max(1, t.dim()))
        changes: list[Callable[[], Tensor]] = [
            lambda: t.unsqueeze(0).clone(),
            lambda: t.flatten().clone(),
            lambda: t.unsqueeze(-1).clone(),
            lambda: t.sum().to(t.dtype),
            lambda: t[None][:0].clone(),
            lambda: torch.cat([t, t], d) if t.dim() else t[None].repeat(2),
            lambda: t.narrow(d, 0, max(0, t.shape[d] - 1)).clone() if t.dim() else t.clone(),
        ]
        return self.random.choice(changes)()

    def _dtype(self, t: Tensor, given: Arguments) -> Tensor:
        return t.to(self.random.choice([*DTYPES, *OTHER_DTYPES]))

    def _meta(self, t: Tensor, given: Arguments) -> Tensor:
        return t.to("meta")

    def _sparse(self, t: Tensor, given: Arguments) -> Tensor:
        return t.to_sparse()

    def _storage(self, t: Tensor, given: Arguments) -> Tensor:
        """Of less memory than its sizes and strides claim."""
        t = t.clone()
        bytes = t.untyped_storage().nbytes()
        t.untyped_storage().resize_(self.random.choice([0, bytes // 2, max(0, bytes - 1)]))
        return t

    def _alias(self, t: Tensor, given: Arguments) -> Tensor:
        """Another argument of the call, where possible one of this shape."""
        others = [o for o in given.values() if isinstance(o, Tensor) and o is not t]
        fitting = [o for o in others if o.shape == t.shape and o.dtype == t.dtype]
        return self.random.choice(fitting or others or [t])

    def _within(self, t: Tensor, given: Arguments) -> Tensor:
        """In the memory of another argument."""
        others = [
            o for o in given.values()
            if isinstance(o, Tensor) and o.is_contiguous() and o.numel() > t.numel()
            and o.dtype == t.dtype and o.device == t.device
        ]  # fmt: skip
        if not others:
            return t
        other = self.random.choice(others)
        start = self.random.randrange(other.numel() - t.numel())
        return other.flatten()[start : start + t.numel()].view(t.shape)

    def _expanded(self, t: Tensor, given: Arguments) -> Tensor:
        d = self.random.randrange(max(1, t.dim()))
        return t.narrow(d, 0, 1).expand(t.shape) if t.dim() and t.numel() else t

    def _strided(self, t: Tensor, given: Arguments) -> Tensor:
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    def _negated(self, t: Tensor, given: Arguments) -> Tensor:
        return t if t.dtype in (torch.bool, torch.uint8) else torch._neg_view(-t)

    def _requires_grad(self, t: Tensor, given: Arguments) -> Tensor:
        floating = t.is_floating_point() or t.is_complex()
        return t.detach().clone().requires_grad_() if floating else t


def text_of(maker: Maker, given: Arguments) -> str:
    """The call for a reader."""

    def one(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        more = "".join(
            f" {word}" for word, said in {
                str(value.device): value.device.type != "cpu",
                f"strides {value.stride() if value.layout is torch.strided else ''}":
                    value.layout is torch.strided and not value.is_contiguous(),
                "sparse": value.layout is not torch.strided,
                "requires_grad": value.requires_grad,
                "negated": value.is_neg(),
            }.items() if said
        )  # fmt: skip
        return f"{str(value.dtype)[6:]}{list(value.shape)}{more}"

    listed = ", ".join(f"{name}={one(value)}" for name, value in given.items())
    return f"{maker.name}({listed})  # {'; '.join(maker.changes) or 'as it should be'}"
