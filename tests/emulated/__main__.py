"""One case in the emulator: python -m tests.emulated SHAPE DTYPE LAYOUT; see docs/kernels.md."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from tests.common import emulated, ptx
from tests.common.cases import FORMATS, assert_promise, case, normal


def main() -> None:
    """One case of batch norm, forward and backward, in the emulator."""
    parser = argparse.ArgumentParser("python -m tests.emulated", description=main.__doc__)
    parser.add_argument("shape", help="N,C,...")
    parser.add_argument("dtype", choices=["float64", "float32", "float16", "bfloat16"])
    parser.add_argument("layout", choices=list(FORMATS))
    parser.add_argument("--seed", type=int, default=0, help="of the order of threads and blocks")
    parser.add_argument("--device", default="sm_80", help="sm_75, sm_80, sm_86, sm_90 or sm_120")
    parser.add_argument("--multiprocessors", type=int, default=2)
    parser.add_argument("--path", choices=["two_pass", "block", "cluster", "grid"])
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--ptx", action="store_true", help="what nvcc makes of the kernels")
    parser.add_argument("--sanitize", action="store_true", help="address, undefined behaviour")
    parser.add_argument("--debug", action="store_true", help="compile without optimisation")
    options = parser.parse_args()
    if options.debug:
        library = emulated.build(flags=[*emulated.FLAGS, "-O0", "-g", "-w"])
        os.environ["BNORM_EXT_EMULATED_LIBRARY"] = str(library)
    if options.sanitize and "BNORM_EXT_EMULATED_LIBRARY" not in os.environ:
        command = [sys.executable, "-m", "tests.emulated", *sys.argv[1:]]
        os.execve(sys.executable, command, emulated.sanitized_environment())
    if options.ptx:
        if ptx.nvcc() is None:
            raise SystemExit(ptx.NO_NVCC)
        folder = ptx.folder_of("kernels", ptx.compile_all(ptx.SOURCES, [75, 80, 90]))
        os.environ["BNORM_EXT_EMULATED_PTX"] = str(folder)
    shape = tuple(int(size) for size in options.shape.split(","))
    c = case(
        normal(shape, seed=0, mean=0.5, std=2),
        getattr(torch, options.dtype),
        layout=options.layout,
        training=not options.inference,
    )
    where = {"seed": options.seed, "device": options.device, "path": options.path}
    results = emulated.run(c, **where, multiprocessors=options.multiprocessors, launches=print)
    for name, (ours, native) in assert_promise(c, ours=results).items():
        print(f"{name:14} error {ours:6.2f} u, native on the CPU {native:6.2f} u")


if __name__ == "__main__":
    main()
