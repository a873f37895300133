"""``explain``: how the CUDA kernels would run a batch norm. It needs no GPU."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._cuda import processes as ranks
from ._gpus import Device, resolve_device
from ._load import load

_KB = 1024

#: Contributions to the predicted time (csrc/cuda/cost.h), in words.
TERMS = {
    "memory": "moving bytes",
    "latency": "too few loads in flight",
    "instructions": "computing",
    "waiting": "launches and barriers",
}
_MODEL = (
    "Predictions are a model's. On an H200, 312 calls took 0.85 to 1.34 times as long as "
    "predicted; other GPUs have not been measured."
)


def explain(
    input: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: str | torch.device | None = None,
    processes: int | None = None,
) -> str:
    """Describes how the CUDA kernels would run a batch norm in training.

    Args:
        input: a tensor (N, C, ...) on any device, or its shape.
        dtype: dtype of the tensor. Default: its own, or float32 for a shape.
        memory_format: memory format of the tensor. Default: its own, or contiguous for a shape.
        device: name of a GPU (A100, H200, RTX 4090, ..., or as CUDA reports it: NVIDIA H100 80GB
            HBM3), or a CUDA device of this machine. Default: the device of the tensor, or the
            current CUDA device.
        processes: how many train together in ``torch.distributed``. With more than one, no
            cooperative grid is taken: it and the collectives would wait for each other. Default:
            the ranks of this process's default group, or 1.

    Returns:
        A text that says for the forward and the backward pass which path is taken, its teams of
        blocks, whether the tensor stays on chip or is read twice, the second time partly from the
        L2, how often it is read and written, and why two launches are taken. It follows from the
        limits of the device. Under MPS or MIG less of the device is available; a launch may then be
        refused, and two passes are taken.

        Where the rates of the device are known, and the dtype is not float64, it also says how long
        the pass takes as a model predicts it, and of what most of that time consists. The planner
        chooses by the same model.

    Raises:
        ValueError: a shape without channels or elements, a device that is neither known nor
            present, or less than one process.
        TypeError: ``processes`` is not a whole number.
    """
    if isinstance(input, Tensor):
        x = input.detach().to("meta")
        device = device if device is not None or not input.is_cuda else input.device
    else:
        x = torch.empty(tuple(input), dtype=dtype or torch.float32, device="meta")
    if dtype is not None:
        x = x.to(dtype)
    if memory_format is not None:
        x = x.contiguous(memory_format=memory_format)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"explain: expected a tensor (N, C, ...) with elements, got {list(x.shape)}"
        )
    if processes is not None and operator.index(processes) < 1:
        raise ValueError(f"explain: processes must be 1 or more, got {processes}")
    gpu = resolve_device(device)
    if load() is None:
        return "BNORM_EXT_DISABLE is set: torch's own batch norm runs"
    shape = "x".join(map(str, x.shape))
    lines: list[str] = []
    for name, tensors in (("forward", 1), ("backward", 2)):
        plan = launch_plan(x, tensors, gpu, beside_collectives=(processes or ranks()) > 1)
        if not lines:
            layout = "channels last" if plan["channels_last"] else "channels first"
            major, minor = gpu.capability
            lines.append(
                f"{shape} {str(x.dtype)[6:]}, {layout}, on {gpu.name} (sm_{major}{minor}, "
                f"{gpu.multiprocessors} multiprocessors)"
            )
        first, *more = _describe(plan, tensors)
        lines += [f"{name}: {first}", *more]
        if is_predicted(x.dtype, gpu):
            lines.append(_prediction(plan["times"]))
    if is_predicted(x.dtype, gpu):
        lines.append(_MODEL)
    return "\n".join(lines)


def is_predicted(dtype: torch.dtype, gpu: Device) -> bool:
    """Whether the model has what it needs: the rates of the GPU. It does not know the FP64 units,
    which bind float64 on many GPUs."""
    return dtype != torch.float64 and gpu.gigabytes_per_second > 0 and gpu.clock_mhz > 0


def binding(times: dict[str, float]) -> str:
    """The largest contribution to a predicted time."""
    return max(times, key=lambda term: times[term])


def _prediction(times: dict[str, float]) -> str:
    parts = sorted(times.items(), key=lambda term: -term[1])
    first, *others = (f"{TERMS[name]} ({us:.1f})" for name, us in parts if us >= 0.05)
    then = f", then {', '.join(others)}" if others else ""
    return f"  predicted: {sum(times.values()):.1f} us, most of them for {first}{then}"


def launch_plan(
    x: Tensor, tensors: int, gpu: Device, *, beside_collectives: bool = False
) -> dict[str, Any]:
    """The launch plan of the forward pass (`tensors` is 1: it reads x) or the backward pass (2: x
    and dy), as a dictionary. `on_chip`: they are read once; else twice, in one launch or, where
    `path` is "two_pass", in two. `times`, `two_passes` and `floor`: microseconds that a model
    predicts (csrc/explain.h)."""
    compiled: Any = load()
    plan: dict[str, Any] = compiled.explain_plan(
        x, tensors, gpu.multiprocessors, gpu.shared_per_multiprocessor, gpu.shared_per_block,
        gpu.l2_bytes, gpu.gigabytes_per_second, gpu.clock_mhz, gpu.clusters, aligned=True,
        beside_collectives=beside_collectives,
    )  # fmt: skip
    return plan


def _describe(plan: dict[str, Any], tensors: int) -> list[str]:
    path, team, tiles = plan["path"], plan["team"], plan["tiles"]
    reads, of = tensors, "x" if tensors == 1 else "x and dy"
    each, threads = _channels(plan["channels"]), f"{plan['threads']} threads"
    access = f"{plan['access_bytes']}-byte accesses"
    if path == "two_pass":
        return [
            f"two passes, {2 * reads} reads + 1 write: {plan['reason']}",
            f"  {tiles} x {team} blocks, {each} each; {threads} a block, {access}",
        ]
    teams = {
        "block": f"{plan['teams']} blocks",
        "cluster": f"{plan['teams']} clusters of {team} blocks",
        "grid": f"{plan['teams']} team{'s' * (plan['teams'] > 1)} of {team} blocks in a "
        "cooperative grid",
    }[path]
    several = plan["teams"] < tiles
    all_of_them = f"{tiles} channels" if plan["channels"] == 1 else f"{tiles} groups of {each}"
    work = f", which take {all_of_them} in turn" if several else f", {each} each"
    if plan["on_chip"]:
        way = f"keeps {of} on chip: {reads} read{'s' * (reads > 1)}"
    else:
        way = f"reads {of} twice, the second time partly from the L2: {2 * reads} reads"
    lines = [
        f"one launch that {way} + 1 write",
        f"  {teams}{work}; {threads} and {plan['shared_bytes'] / _KB:.1f} KB of shared memory a "
        f"block, {access}",
    ]
    if path != "block":
        tile, share = plan["tile_bytes"], plan["share_bytes"]
        lines.append(
            f"  a team, since {each} {'is' if plan['channels'] == 1 else 'are'} {tile / _KB:.0f} "
            f"KB, and a block has {share / _KB:.0f} KB"
            if plan["on_chip"] and tile > share
            else "  a team, so that all multiprocessors have work"
        )
    return lines


def _channels(count: int) -> str:
    return "a channel" if count == 1 else f"{count} channels"
