"""Bank conflicts of the kernels' accesses to shared memory, as the emulator counts them.

Addresses are not in the machine code, so small calls are executed (cuda_emulator/README.md). A
warp's access takes turns where its threads need other words of the same bank. What is counted is
how many times as many turns the worst access takes as one without conflicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .compile import CSRC, Missing

#: Paths, and a device on which each is possible.
_PATHS: dict[str, dict[str, Any]] = {
    "two_pass": {"path": "two_pass"},
    "block": {"path": "block"},
    "cluster": {"path": "cluster", "device": "sm_90", "multiprocessors": 4},
    "grid": {"path": "grid", "multiprocessors": 3},
}
_SHAPES = {
    "contiguous": [(8, 2, 32, 48), (9, 16, 7, 7), (3, 5, 7, 3)],
    "channels_last": [(9, 8, 13, 11), (4, 128, 8, 8), (4, 37, 13, 11)],
}


def report(kernels: Sequence[str]) -> None:
    if not (CSRC.parent / "tests" / "common" / "emulated.py").exists():
        raise Missing("the emulator is not here: run it from a checkout")
    print(
        f"{'kernel':26}{'dtype':9} {'layout':14} turns of the worst access, by its bytes a thread"
    )
    for (kernel, dtype, layout), ways in sorted(counted().items()):
        if kernel in kernels:
            listed = ", ".join(f"{size}: {worst}" for size, worst in sorted(ways.items()))
            print(f"{kernel:26}{dtype:9} {layout:14} {listed or 'none'}")


def counted(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[tuple[str, str, str], dict[int, int]]:
    """By kernel, dtype and layout: for accesses of so many bytes, the greatest number of turns over
    those without conflicts, in forward and backward of small tensors on every path."""
    import torch

    from tests.common import emulated
    from tests.common.emulated_cases import made

    found: dict[tuple[str, str, str], dict[int, int]] = defaultdict(dict)
    for dtype in dtypes:
        for layout, shapes in _SHAPES.items():
            for where in _PATHS.values():
                if layout == "channels_last" and where["path"] == "cluster":
                    continue
                profiles: list[Any] = []
                for shape in shapes:
                    case = made(shape, getattr(torch, dtype), layout)
                    emulated.run(case, profiles=profiles.append, **where)
                for profile in profiles:
                    kernel = profile.kernel.split("<")[0].split("::")[-1]
                    ways = found[kernel, dtype, layout]
                    for size, worst in profile.ways.items():
                        ways[size] = max(worst, ways.get(size, 0))
    return found
