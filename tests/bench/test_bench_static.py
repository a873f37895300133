"""Counting in SASS: against a kernel that was counted by hand, and against nvcc's own output."""

from __future__ import annotations

import math

import pytest

from bnorm_ext._gpus import GPUS
from bnorm_ext.bench.static import __main__ as program
from bnorm_ext.bench.static import compile as compiling
from bnorm_ext.bench.static import conflicts, kernels, known, sass, units
from bnorm_ext.bench.static.counts import loop_pass, straight_pass
from bnorm_ext.bench.static.flow import Flow
from tests.common.bench_programs import refused

# A kernel in the manner of cuobjdump, with what the counting has to see through. By hand:
#   before the loop   0000-0040: 5 instructions; the parameter at 0x170 - 0x160 = 16 (a byte)
#                     decides at 0040 between the loop and the slow way 0140-0150
#   the loop          0050-00f0, back to 0050 while P1: 11 instructions without the branch at
#                     0090-00a0, which a batch that is not full takes; 2 loads and 1 store of 128
#                     bits, of FP64 1, a conversion from float to double, a load of 32 bits
#   behind it         0100-0130: 3 instructions, and one whose guard is never true
EXAMPLE = """
	code for sm_80
		Function : example
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe40000000f00 */
        /*0010*/                   ULDC.U8 UR4, c[0x0][0x170] ;
        /*0020*/                   ISETP.NE.AND P0, PT, RZ, UR4, PT ;
        /*0030*/                   IMAD.MOV.U32 R2, RZ, RZ, c[0x0][0x160] ;
        /*0040*/               @P0 BRA 0x140 ;
        /*0050*/                   ISETP.GE.AND P2, PT, R2, 0x2, PT ;
        /*0060*/                   LDG.E.128 R4, [R10.64] ;
        /*0070*/              @!P2 BRA 0x90 ;
        /*0080*/                   BRA 0xb0 ;
        /*0090*/                   MOV R8, RZ ;
        /*00a0*/                   BRA 0xc0 ;
        /*00b0*/                   LDG.E.128 R12, [R10.64+0x10] ;
        /*00c0*/                   F2F.F64.F32 R16, R4 ;
        /*00d0*/                   DADD R18, R18, R16 ;
        /*00e0*/                   STG.E.128 [R20.64], R4 ;
        /*00f0*/               @P1 BRA 0x50 ;
        /*0100*/                   LDG.E R22, [R10.64] ;
        /*0110*/              @!PT BRA 0x140 ;
        /*0120*/                   STG.E [R20.64], R22 ;
        /*0130*/                   EXIT ;
        /*0140*/                   MUFU.EX2 R3, R3 ;
        /*0150*/                   BRA 0x50 ;
"""


@pytest.fixture
def example() -> sass.Function:
    (function,) = sass.parse(EXAMPLE)
    return function


def test_parse(example):
    assert (example.name, example.arch, len(example.code)) == ("example", 80, 22)
    load = example.code[6]
    assert (load.name, load.bits, load.operands) == ("LDG", 128, ("R4", "[R10.64]"))
    branch = example.code[7]
    assert (branch.guard, branch.negated, branch.target) == ("P2", True, 0x90)
    assert example.code[17].guard == "PT"
    assert example.code[17].negated


def test_registers_are_read_from_the_usage():
    usage = "\n Function example:\n  REG:38 STACK:0 SHARED:0 LOCAL:0\n"
    (function,) = sass.parse(EXAMPLE + usage)
    assert function.registers == 38


def test_a_full_pass_as_counted_by_hand(example):
    flow = Flow(example, {16: 0})
    (loop,) = flow.loops
    once = loop_pass(flow, loop, ("LDG", "STG"), 128)
    assert [f"{i.address:02x}" for i in once.code] == [
        *("50", "60", "70", "80", "b0", "c0", "d0", "e0", "f0")
    ]
    assert (once.accesses("LDG", 128), once.accesses("STG", 128)) == (2, 1)
    units = once.by_unit()
    assert (units["fp64"], units["conversions64"], units["global loads"]) == (1, 1, 2)
    rest = straight_pass(flow, [loop])
    assert [i.address for i in rest.code] == [0, 0x10, 0x20, 0x30, 0x40, 0x100, 0x110, 0x120, 0x130]


@pytest.mark.parametrize(("byte", "slow"), [(0, False), (3, True), (None, True)])
def test_what_the_parameters_exclude_is_not_reached(example, byte, slow):
    flow = Flow(example, {} if byte is None else {16: byte})
    names = {i.name for n in flow.reached for i in flow.blocks[n].code}
    assert ("MUFU" in names) == slow


def test_stores_that_are_switched_off_do_not_count():
    (function,) = sass.parse(
        """
        code for sm_80
                Function : stores
        /*0000*/                   ULDC.U8 UR4, c[0x0][0x170] ;
        /*0010*/                   ISETP.NE.AND P0, PT, RZ, UR4, PT ;
        /*0020*/               @P0 STG.E.EF.128 [R20.64], R4 ;
        /*0030*/              @!P0 STG.E.128 [R20.64], R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   EXIT ;
        """
    )
    flow = Flow(function, {16: 0})
    once = loop_pass(flow, flow.loops[0], ("STG",), 128)
    assert (once.instructions, once.accesses("STG", 128)) == (3, 1)


def test_the_condition_of_a_uniform_branch():
    """sm_100 and newer write it as an operand."""
    (function,) = sass.parse(
        """
        code for sm_100
                Function : uniform
        /*0000*/                   LDCU.U8 UR4, c[0x0][0x390] ;
        /*0010*/                   UISETP.NE.AND UP0, UPT, UR4, URZ, UPT ;
        /*0020*/                   LDG.E.128 R4, desc[UR6][R10.64] ;
        /*0030*/                   BRA.U !UP0, 0x50 ;
        /*0040*/                   STG.E.128 desc[UR6][R20.64], R4 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   EXIT ;
        """
    )
    branch = function.code[3]
    assert (branch.guard, branch.negated, branch.target) == ("UP0", True, 0x50)
    for byte, stores in ((0, 0), (1, 1)):
        flow = Flow(function, {16: byte})
        once = loop_pass(flow, flow.loops[0], ("LDG", "STG"), 128)
        assert (once.accesses("LDG", 128), once.accesses("STG", 128)) == (1, stores)


def test_loops_inside_of_loops():
    (function,) = sass.parse(
        """
        code for sm_90
                Function : nested
        /*0000*/                   MOV R1, RZ ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   DADD R4, R4, R6 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        """
    )
    flow = Flow(function, {})
    (outer,) = flow.loops
    (inner,) = outer.inner
    assert loop_pass(flow, outer, (), 128).instructions == 2
    assert loop_pass(flow, inner, (), 128).instructions == 2


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        ("MOV R1, 0x5", {}, {"R1": 5}),
        ("@P0 MOV R1, 0x5", {"R1": 4, "P0": 0}, {"R1": 4, "P0": 0}),
        ("@P0 MOV R1, 0x5", {"R1": 4}, {}),
        ("PRMT R2, R1, 0x9910, RZ", {"R1": 0xFF80}, {"R1": 0xFF80, "R2": 0xFFFFFF80}),
        ("SEL R2, RZ, 0x1, P0", {"P0": 0}, {"P0": 0, "R2": 1}),
        ("LOP3.LUT R2, R1, 0xf0, RZ, 0xc0, !PT", {"R1": 0xFF}, {"R1": 0xFF, "R2": 0xF0}),
        ("PLOP3.LUT P1, PT, P0, P2, PT, 0x80, 0x0", {"P0": 0}, {"P0": 0, "P1": 0}),
        ("P2R R2, PR, RZ, 0x2", {"P1": 1}, {"P1": 1, "R2": 2}),
        ("P2R R2, PR, RZ, 0x3", {"P1": 1, "R2": 0}, {"P1": 1}),
        ("ISETP.LT.AND P0, PT, R1, RZ, PT", {"R1": 0xFFFFFFFF}, {"R1": 0xFFFFFFFF, "P0": 1}),
        ("ISETP.NE.U32.AND P0, PT, RZ, c[0x0][0x168], PT", {}, {"P0": 1}),
        ("ISETP.NE.AND.EX P0, PT, RZ, c[0x0][0x16c], PT, P1", {"P1": 0}, {"P0": 1, "P1": 0}),
        ("ISETP.EQ.AND.EX P0, PT, RZ, RZ, PT, P1", {"P1": 0}, {"P0": 0, "P1": 0}),
        ("LDG.E.64 R2, [R4.64]", {"R2": 1, "R3": 1, "R4": 1}, {"R4": 1}),
        ("DADD R2, R4, R6", {"R2": 1, "R3": 1}, {}),
    ],
)
def test_known_registers(line, before, after):
    (function,) = sass.parse(f"\n code for sm_80\n\t Function : f\n  /*0000*/  {line} ;\n")
    # A pointer at 8 that is not null.
    evaluator = known.Evaluator(function, {8 + k: 1 for k in range(8)})
    values = dict(before)
    evaluator.step(function.code[0], values)
    assert values == after


def test_a_call_changes_what_the_subroutine_writes():
    (function,) = sass.parse(
        """
        code for sm_80
                Function : calls
        /*0000*/                   CALL.REL.NOINC 0x20 ;
        /*0010*/                   EXIT ;
        /*0020*/                   DADD R4, R4, R6 ;
        /*0030*/                   RET.REL.NODEC R8 0x0 ;
        /*0040*/                   MOV R2, RZ ;
        """
    )
    values = {"R2": 1, "R4": 2, "R5": 3, "R6": 4}
    known.Evaluator(function, {}).step(function.code[0], values)
    assert values == {"R2": 1, "R6": 4}


def test_a_call_that_does_not_come_back_is_a_branch():
    (function,) = sass.parse(
        """
        code for sm_80
                Function : leaves
        /*0000*/                   MOV R2, RZ ;
        /*0010*/                   LDG.E.128 R4, [R10.64] ;
        /*0020*/               @P0 CALL.REL.NOINC 0x40 ;
        /*0030*/                   BRA 0x10 ;
        /*0040*/                   CALL.REL.NOINC 0x70 ;
        /*0050*/                   MOV R5, RZ ;
        /*0060*/                   EXIT ;
        /*0070*/                   MOV R3, RZ ;
        /*0080*/                   RET.REL.NODEC R8 0x0 ;
        """
    )
    assert [i.name for i in function.code if i.target] == ["BRA", "BRA", "CALL"]
    flow = Flow(function, {})
    (loop,) = flow.loops
    assert loop_pass(flow, loop, ("LDG",), 128).instructions == 3
    assert [i.address for i in straight_pass(flow, [loop]).code] == [0, 0x40, 0x50, 0x60]


def test_offsets_are_those_of_the_structs():
    fields = [("StatisticsParams", "shape.N"), ("StatisticsParams", "shape.C")]
    assert list(kernels.offsets(fields).values()) == [0, 8]


def test_every_gpu_has_rates():
    for name in GPUS:
        device, rates = units.rates_of(name)
        assert device.name == name
        assert units.compiled_for(device) in known.PARAMETERS_AT
        assert rates.issue > 0
        assert min(device.l2_bytes, device.gigabytes_per_second, device.clock_mhz) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "70"], "--arch: 70 is none of 75, 80, "),
        (["--arch", "x"], "--arch: 'x'"),
        (["--gpu", "GTX 1"], "unknown device 'GTX 1'"),
        (["--kernel", "softmax"], "--kernel: unknown 'softmax'"),
    ],
)
def test_odd_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(program, "tools", lambda: None)
    assert message in refused(program, arguments, capsys)


def test_without_the_sources_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "CSRC", tmp_path)
    assert "run it from a checkout" in refused(program, [], capsys)


def _compiled() -> bool:
    try:
        compiling.tools()
    except compiling.Missing:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not _compiled(), reason="there is no nvcc, or no cuobjdump")
@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernels_have_the_loops_that_are_counted(arch):
    from bnorm_ext.bench.static.instances import counts

    for kernel in kernels.KERNELS:
        found = counts(kernel, arch)
        assert len({(c.dtype, c.width, c.mapping) for c in found}) == len(found) > 0
        for c in found:
            roles = [loop.role for loop in c.loops]
            assert roles.count("sums") == kernel.sums, c
            assert roles.count("write") == kernel.writes, c
            # Each element is at least loaded or stored once, and no kernel takes a hundred
            # instructions for one.
            assert 0 < c.per_element() < 100, c
            # No activation is computed (for narrow accesses, the evaluator loses the parameter in
            # the forward kernel on chip), no way of storing is counted twice, and a batch has at
            # most four vectors.
            assert c.per_element("special") == 0 or c.width == 1, c
            computing = [loop for loop in c.loops if loop.role != "fetch"]
            assert all(loop.elements <= 4 * c.width for loop in computing), c
            assert math.isfinite(c.rest.instructions)


def test_conflicts_are_listed(capsys, monkeypatch):
    found = {
        ("normalise_kernel", "float32", "contiguous"): {},
        ("statistics_kernel", "bfloat16", "contiguous"): {16: 1, 4: 2},
    }
    monkeypatch.setattr(conflicts, "counted", lambda: found)
    assert program.main(["--conflicts"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["normalise_kernel", "float32", "contiguous", "none"],
        ["statistics_kernel", "bfloat16", "contiguous", "4:", "2,", "16:", "1"],
    ]
    assert program.main(["--conflicts", "--kernel", "normalise_kernel"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.slow
def test_conflicts_are_counted():
    """As tests/emulated/test_emulated_memory.py has them: none in accesses of 16 bytes."""
    found = conflicts.counted(["float32"])
    assert {kernel for kernel, _, _ in found} >= {kernel.name for kernel in kernels.KERNELS}
    assert all(ways.get(16, 1) == 1 for ways in found.values())
    assert found["sweep_forward_kernel", "float32", "channels_last"][16] == 1
