"""What the PTX interpreter refuses, with file and line, and what it reports while it runs."""

from __future__ import annotations

import re

import pytest

from cuda_emulator import building, ptx
from tests.common import ptx_programs
from tests.common.ptx_programs import OWN

if building.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

LINE = ptx_programs.HEAD.count("\n") + 2  # of the second line of a body

REFUSED = {
    "ld.global.nc.u32 %r1, [%rd10];": "unknown instruction",
    "add.sat.s32 %r1, %r1, %r1;": "unknown instruction",
    "mov.u32 %r1, %tid.y;": "there is no register %tid.y",
    "mov.u32 %r1, elsewhere;": "unknown operand: elsewhere",
    "mov.u32 %r64, 1;": "there is no register %r64",
    "bra $L_nowhere;": "there is no label $L_nowhere",
    "bar.sync 1;": "a barrier other than 0",
    "barrier.cluster.wait;": "does not follow directly on its arrive",
    "add.s32 %r1, %r1;": "not 3 operands",
    "ld.global.v2.u32 {%r1, %r2, %r3}, [%rd10];": "not 2 elements",
    "ld.global.u32 %r1, %rd10;": "not an address",
    "cp.async.cg.shared.global [%r1], [%rd10], 8;": "a copy of other than 16 bytes",
    ".local .align 8 .b8 memory[16];": "unknown declaration",
}


def run(body: str, **launch: object) -> str:
    """What is printed for a program that writes up to 256 bytes."""
    try:
        ptx.run_program(ptx_programs.program(body), bytes(256), 256, **launch)  # type: ignore[arg-type]
    except ptx.Failed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("statement", "reason"), REFUSED.items())
def test_refused(statement: str, reason: str) -> None:
    printed = run(f"add.s32 %r1, 1, 2;\n{statement}")
    assert f"program.ptx:{LINE}: " in printed
    assert reason in printed
    assert "cudaErrorInvalidPtx" in printed


def test_listing_refuses_too(tmp_path) -> None:
    file = tmp_path / "kernels.ptx"
    file.write_text(ptx_programs.program("add.s32 %r1, 1, 2;\nfma.rz.f32 %f1, %f1, %f1, %f1;"))
    with pytest.raises(ptx.Failed, match=rf"kernels\.ptx:{LINE}: unknown instruction: fma\.rz"):
        ptx.listed(file)


# A part of the report: program, launch.
REPORTED: dict[str, tuple[str, dict[str, int]]] = {
    "race: .* nothing orders the two": ("st.global.u32 [%rd11], %r0;", {"threads": 2}),
    "outside: .* directly after the end of 'out'": ("st.global.u32 [%rd11+256], %r0;", {}),
    "outside: .* 4 bytes before the start of 'in'": (
        "prefetch.global.L2 [%rd10+-4];",
        {},
    ),
    "outside: .* which is an input": ("st.global.u32 [%rd10], %r0;", {}),
    r"misaligned: .* reads 8 bytes at shared memory \+4": (
        "ld.shared.v2.u32 {%r10, %r11}, [%r6+4];",
        {"shared_bytes": 16},
    ),
    r"misaligned: .* writes 8 bytes at shared memory \+12": (
        "st.shared.u64 [%r6+12], %rd10;",
        {"shared_bytes": 32},
    ),
    "uninitialised: .* which nobody wrote yet": (
        "ld.shared.u32 %r10, [%r6];",
        {"shared_bytes": 16},
    ),
    "async: .* nobody waited for it": (
        "cp.async.cg.shared.global [%r6], [%rd10], 16;\nld.shared.u32 %r10, [%r6];",
        {"shared_bytes": 16},
    ),
    "barrier: .* has exited": (
        "setp.eq.s32 %p1, %r0, 0;\n@%p1 ret;\nbar.sync 0;",
        {"threads": 64},
    ),
    "warp: .* with mask 0xffff, which does not name": (
        "shfl.sync.bfly.b32 %r10|%p1, %r0, 1, 31, 65535;",
        {"threads": 32},
    ),
    "cluster: .* in a launch without clusters": (
        "barrier.cluster.arrive;\nbarrier.cluster.wait;",
        {},
    ),
    "cluster: .* asks for block 2 of a cluster of 2": (
        "cvt.u64.u32 %rd20, %r6;\ncvta.shared.u64 %rd20, %rd20;\nmapa.u64 %rd20, %rd20, 2;",
        {"blocks": 2, "cluster": 2},
    ),
    "livelock: .* none of them gets anywhere": (
        "$L_again:\nld.acquire.gpu.u32 %r10, [%rd11];\nbra $L_again;",
        {},
    ),
    "ptx: .* shuffles within a part": (
        "shfl.sync.bfly.b32 %r10|%p1, %r0, 1, 7695, -1;",
        {"threads": 32},
    ),
    r"ptx: .* reads 8 bytes at \+16 of 16": ("ld.param.u64 %rd10, [program_param_1+8];", {}),
    "ptx: .* maps an address": ("mapa.u64 %rd20, %rd10, 0;", {"cluster": 1}),
}


@pytest.mark.parametrize("report", REPORTED)
def test_reported(report: str) -> None:
    body, launch = REPORTED[report]
    printed = run(OWN + body, **launch)
    assert re.search(report, printed), printed
    assert "cudaErrorInvalidPtx" not in printed


def test_registers_that_nobody_wrote_are_poisoned() -> None:
    """A NaN, whatever an earlier thread has left."""
    body = OWN + "mov.f32 %f2, 0f3F800000;\nadd.rn.f32 %f3, %f1, %f2;\n"
    body += "st.global.f32 [%rd1], %f3;\nmov.f32 %f1, %f2;"
    out = ptx.run_program(ptx_programs.program(body), bytes(256), 256, threads=64)
    assert out == bytes.fromhex("ffffff7f") * 64


def test_code_of_a_newer_device() -> None:
    printed = run("add.s32 %r1, 1, 2;", device="sm_80")
    assert "has a kernel program for sm_80" in printed
    assert "cudaErrorNoKernelImageForDevice" in printed


def test_other_parameters_than_the_launch_has() -> None:
    head = ptx_programs.HEAD.replace(".param .u64 program_param_1", ".param .u32 program_param_1")
    with pytest.raises(ptx.Failed, match="the parameters have other sizes"):
        ptx.run_program(ptx_programs.program("", head), bytes(8), 8)
