"""What a direct call of torch.ops.bnorm_ext.* has to do: whether its arguments fit, and the results
in plain torch, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.common.cases import DTYPES, accumulation_type
from tests.common.fused_cases import ACTS, KINKS, activate
from tests.common.operator_calls import BUFFERS, MADE, Arguments, parameters

MAY_NOT = "either is right"


def refusal(name: str, a: Arguments) -> str | None:
    """Why the call has to be refused; None: it has to be accepted. A reason that begins with
    `MAY_NOT` stands for calls that may do either."""
    for p in parameters(name):
        reason = _of_type(p, a)
        if reason is not None:
            return reason if reason == MAY_NOT else f"{p.name}: {reason}"
    tensors = {n: t for n, t in a.items() if isinstance(t, Tensor)}
    first = a["mean"] if name == "batch_norm_merge_stats" else a["x"]
    for n, t in tensors.items():
        if t.device != first.device or t.layout is not torch.strided:
            # The rules look at no mask and no statistics that are not read.
            return f"{n}: on {t.device}, {t.layout}" if _is_read(name, n, a) else MAY_NOT
        if _lacks_memory(t):
            return f"{n}: less memory than elements" if _is_read(name, n, a) else MAY_NOT
    if first.device.type == "meta":
        return MAY_NOT
    reason = _merged(a) if name == "batch_norm_merge_stats" else _of_batch(name, a)
    return reason or _overlap(name, a)


def _of_type(p: Any, a: Arguments) -> str | None:
    kind, value = str(p.type), a[p.name]
    if "bool" in kind and "List" not in kind:
        # Torch's parser takes what has a truth value.
        return None if isinstance(value, bool) else MAY_NOT
    if value is None:
        if kind.startswith("Optional"):
            return None
        # Torch hands None on as a tensor that is not defined.
        return MAY_NOT if p.name in BUFFERS and a["x"].numel() == 0 else "None"
    if "Tensor" in kind:
        return None if isinstance(value, Tensor) else "no tensor"
    if "float" in kind:
        return None if isinstance(value, (int, float)) else "no number"
    if "str" in kind:
        return None if isinstance(value, str) else "no text"
    if "List[bool]" in kind:
        return None if len(value) == 4 else "not four"
    return None


def _is_read(name: str, argument: str, a: Arguments) -> bool:
    if name == "batch_norm_backward" and argument in ("mean", "rstd"):
        return bool(a["train"])
    if name == "batch_norm_backward" and argument in BUFFERS:
        return not a["train"]
    x = a.get("x")
    return x is None or x.numel() > 0 or argument == "x"


def _lacks_memory(t: Tensor) -> bool:
    if t.device.type == "meta" or t.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() > t.untyped_storage().nbytes()


def _of_batch(name: str, a: Arguments) -> str | None:
    x = a["x"]
    training = name == "batch_norm_training"
    if x.dtype not in DTYPES or x.dim() < 2:
        return f"x: {x.dtype}, {x.dim()} dimensions"
    C = x.shape[1]
    if a.get("act", "identity") not in ACTS:
        return "act"
    inference = name == "batch_norm_inference" or a.get("train") is False
    if (training and a["eps"] <= 0) or (inference and a["eps"] < 0):
        return "eps"
    if training and [s for d, s in enumerate(x.shape) if d != 1 and s != 1] == []:
        return "one value per channel"
    for n in ("dy", "residual"):
        t = a.get(n)
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype):
            return f"{n}: {t.dtype}{list(t.shape)}"
    if name == "batch_norm_training" or inference:
        reason = _buffers(name, a, x.dtype, C, x.numel() == 0)
        if reason is not None:
            return reason
    for n in ("weight", "bias"):
        t = a.get(n)
        if t is not None and (
            t.numel() != C or t.dtype not in (x.dtype, accumulation_type(x.dtype))
        ):
            return MAY_NOT if x.numel() == 0 else f"{n}: {t.dtype}{list(t.shape)}"
        if t is not None and t.dim() != 1 and not t.is_contiguous():
            return MAY_NOT
    if len({a[n].dtype for n in ("weight", "bias") if a.get(n) is not None}) == 2:
        return MAY_NOT if x.numel() == 0 else "weight and bias of two dtypes"
    if name != "batch_norm_backward" or a["train"]:
        for n in MADE:
            if n in a and not _is_made(n, a[n], C, x.dtype):
                return f"{n}: {'none' if a[n] is None else a[n].shape}"
    return _mask(a)


def _is_made(name: str, t: Tensor | None, C: int, dtype: torch.dtype) -> bool:
    return (
        t is not None
        and (t.shape == (C,) or (name == "mean" and t.shape == (2, C)))
        and t.dtype == accumulation_type(dtype)
        and t.is_contiguous()
    )


def _mask(a: Arguments) -> str | None:
    mask = a.get("mask")
    if mask is None:
        return None
    # The length is for the operator to know: every mask but forward's own is some spoiled one.
    return None if mask is a.get("_mask") and a["act"] == a["_act"] else MAY_NOT


def _buffers(name: str, a: Arguments, dtype: torch.dtype, C: int, empty: bool) -> str | None:
    mean, var = a["running_mean"], a["running_var"]
    counter = a.get("num_batches_tracked")
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        return "counter"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (mean, var)):
        return "a running statistic that requires a gradient"
    if a.get("momentum", 0) is None and counter is None and mean is not None:
        return "momentum None without a counter"
    if empty:
        fits = all(
            t is None or (t.shape == (C,) and t.dtype in (dtype, accumulation_type(dtype)))
            for t in (mean, var)
        )
        return None if fits and (mean is None) == (var is None) else MAY_NOT
    if (mean is None) != (var is None):
        return "half of the running statistics"
    if mean is None:
        return "no running statistics" if "momentum" not in a else None
    if mean.shape != (C,) or var.shape != (C,):
        return "sizes of the running statistics"
    kinds = {mean.dtype, var.dtype}
    kinds |= {a[n].dtype for n in ("weight", "bias") if a.get(n) is not None}
    if len(kinds) > 1 or not kinds <= {dtype, accumulation_type(dtype)}:
        return "dtypes of the running statistics"
    return None


def _merged(a: Arguments) -> str | None:
    mean, var, count = a["mean"], a["var"], a["count"]
    if any(t.dtype != torch.float64 for t in (mean, var, count)):
        return "dtypes"
    if mean.dim() != 2 or mean.shape != var.shape or count.shape != mean.shape[:1]:
        return "shapes"
    if a["dtype"] not in DTYPES:
        return "dtype"
    if a["eps"] <= 0:
        return "eps"
    # As those of a batch that is not empty where there are channels.
    reason = _buffers("", a, a["dtype"], mean.shape[1], mean.shape[1] == 0)
    if reason is not None:
        return reason
    total = count.sum().item()
    if not (count >= 0).all() or not 1 < total < 2**53 or total != int(total):
        return "counts"
    return None


def _overlap(name: str, a: Arguments) -> str | None:
    """What is written in place may not lie in the memory of something else."""
    if name not in ("batch_norm_training", "batch_norm_merge_stats"):
        return None
    written = [n for n in BUFFERS if a[n] is not None and a[n].numel() > 0]
    for n in written:
        if a[n].numel() > 1 and 0 in a[n].stride():
            return f"{n} overlaps itself"
        for other in a:
            if other == n or not isinstance(a[other], Tensor):
                continue
            if _addresses(a[n]) & _addresses(a[other]):
                empty = "x" in a and a["x"].numel() == 0
                return MAY_NOT if empty else f"{n} overlaps {other}"
    return None


def _addresses(t: Tensor) -> set[int]:
    """Of all its elements."""
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    return {t.data_ptr() + p * t.element_size() for p in places.flatten().tolist()}


# ---- Results ------------------------------------------------------------------------------------


def expected(name: str, a: Arguments) -> dict[str, Tensor] | None:
    """The results by name, and `running_mean` and so on; None: rounding decides."""
    f = {n: t.double() if isinstance(t, Tensor) else t for n, t in a.items()}
    if name == "batch_norm_merge_stats":
        return None if (f["var"] < 0).any() else _merge(f)
    x = f["x"]
    dims = [0, *range(2, x.dim())]
    if name == "batch_norm_stats":
        empty = x.numel() == 0
        zeros = torch.zeros(x.shape[1], dtype=torch.float64)
        return {
            "mean": zeros if empty else x.mean(dims),
            "var": zeros if empty else x.var(dims, correction=0),
        }
    if x.numel() == 0:
        return None
    per_channel = [1, -1, *[1] * (x.dim() - 2)]

    def wide(t: Tensor) -> Tensor:
        return t.reshape(per_channel)

    out: dict[str, Tensor] = {}
    if name == "batch_norm_training":
        mean, var = x.mean(dims), x.var(dims, correction=0)
        rstd = (var + f["eps"]).rsqrt()
        out |= {"mean": mean, "rstd": rstd}
        out |= _running(f, mean, var, x.numel() / x.shape[1])
    elif name == "batch_norm_inference" or a.get("train") is False:
        mean, rstd = f["running_mean"], (f["running_var"] + f["eps"]).rsqrt()
    else:
        mean, rstd = f["mean"], f["rstd"]
        mean = mean.sum(0) if mean.dim() == 2 else mean
    xhat = (x - wide(mean)) * wide(rstd)
    weight = 1.0 if f["weight"] is None else wide(f["weight"])
    z = xhat * weight + (0.0 if f["bias"] is None else wide(f["bias"]))
    residual = f.get("_residual", f["residual"]) if f.get("mask") is not None else f["residual"]
    z = z if residual is None else z + residual
    act = a["act"]
    if "dy" not in a:
        return {"y": _act(z, act, f["negative_slope"]), **out}
    if any(((z - k).abs() < 0.05).any() for k in KINKS.get(act, [])):
        return None
    leaf = z.detach().requires_grad_()
    g = torch.autograd.grad(_act(leaf, act, f["negative_slope"]).sum(), leaf)[0] * f["dy"]
    if name == "batch_norm_backward_reduce":
        return {"sum_dy": g.sum(dims), "sum_dy_xhat": (g * xhat).sum(dims)}
    if name == "batch_norm_backward_apply":
        means = wide(f["mean_dy"]), wide(f["mean_dy_xhat"])
    elif a["train"]:
        means = g.mean(dims, keepdim=True), (g * xhat).mean(dims, keepdim=True)
    else:
        means = 0.0, 0.0
    out["dx"] = (g - means[0] - xhat * means[1]) * weight * wide(rstd)
    out["dresidual"] = g
    out |= {"dweight": (g * xhat).sum(dims), "dbias": g.sum(dims)}
    return out


def _act(z: Tensor, act: str, slope: float) -> Tensor:
    if act == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, slope)
    return activate(z, act)


def _running(f: Arguments, mean: Tensor, var: Tensor, count: float) -> dict[str, Tensor]:
    counter, momentum = f["num_batches_tracked"], f["momentum"]
    out = {} if counter is None else {"num_batches_tracked": counter + 1}
    if momentum is None:
        momentum = 0.0 if counter is None else 1 / (counter + 1)
    if f["running_mean"] is not None:
        unbiased = var * count / (count - 1)
        for n, new in (("running_mean", mean), ("running_var", unbiased)):
            out[n] = (1 - momentum) * f[n] + momentum * new
    return out


def _merge(f: Arguments) -> dict[str, Tensor]:
    count = f["count"][:, None]
    mean = (f["mean"] * count).sum(0) / count.sum()
    squares = (f["var"] * count).sum(0) + ((f["mean"] - mean).square() * count).sum(0)
    var = squares / count.sum()
    out = {"mean": mean, "rstd": (var + f["eps"]).rsqrt()}
    return out | _running(f, mean, var, count.sum().item())
