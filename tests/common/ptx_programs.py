"""Small PTX programs: kernels `program(in, out)` that the interpreter runs by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HEAD = """\
.version 9.0
.target sm_90
.address_size 64

.extern .shared .align 16 .b8 memory[];

.visible .entry program(
    .param .u64 program_param_0,
    .param .u64 program_param_1
)
{
    .reg .pred %p<64>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<64>;
    .reg .f32 %f<64>;
    .reg .b64 %rd<64>;
    .reg .f64 %fd<64>;

    // in and out
    ld.param.u64 %rd10, [program_param_0];
    ld.param.u64 %rd11, [program_param_1];
"""


def program(body: str, head: str = HEAD) -> str:
    return head + body + "\nret;\n}\n"


#: %r0 = thread, %r1 = 4 * thread, %rd0 and %rd1 = the thread's words of in and out, %r2 = its word
#: of shared memory.
OWN = """
mov.u32 %r0, %tid.x;
mov.u32 %r3, %ctaid.x;
mov.u32 %r4, %ntid.x;
mad.lo.s32 %r5, %r3, %r4, %r0;
mul.wide.u32 %rd2, %r5, 4;
add.s64 %rd0, %rd10, %rd2;
add.s64 %rd1, %rd11, %rd2;
shl.b32 %r1, %r0, 2;
mov.u32 %r6, memory;
add.s32 %r2, %r6, %r1;
"""


@dataclass
class Program:
    body: str
    given: list[int]  # words of in
    right: list[int]  # of out
    launch: dict[str, Any] = field(default_factory=dict)


COUNT = 64
NUMBERS = [(37 * i + 11) % 101 for i in range(COUNT)]

PROGRAMS = {
    # out = in of the thread opposite, in a block, through shared memory.
    "barrier": Program(
        OWN
        + """
        ld.global.u32 %r10, [%rd0];
        st.shared.u32 [%r2], %r10;
        bar.sync 0;
        mov.u32 %r11, 252;
        sub.s32 %r11, %r11, %r1;
        add.s32 %r11, %r11, %r6;
        ld.shared.u32 %r12, [%r11];
        st.global.u32 [%rd1], %r12;
        """,
        NUMBERS,
        NUMBERS[::-1],
        {"threads": COUNT, "shared_bytes": 256},
    ),
    # Whether any in of the block is 5; whether any of the warp is, and whether all of it are not.
    "votes": Program(
        OWN
        + """
        ld.global.u32 %r10, [%rd0];
        setp.eq.s32 %p1, %r10, 1000;
        { .reg .pred %p1; .reg .pred %p2;
          setp.eq.s32 %p1, %r10, 5;
          bar.red.or.pred %p2, 0, %p1;
          selp.u32 %r11, 1, 0, %p2; }
        @%p1 mov.u32 %r11, 77;
        mov.u32 %r13, -1;
        setp.eq.s32 %p3, %r10, 5;
        vote.sync.any.pred %p4, %p3, %r13;
        @!%p4 bra $L_none;
        add.s32 %r11, %r11, 10;
        bra.uni $L_end;
        $L_none:
        add.s32 %r11, %r11, 20;
        $L_end:
        not.pred %p5, %p3;
        vote.sync.all.pred %p6, %p5, %r13;
        @%p6 add.s32 %r11, %r11, 100;
        st.global.u32 [%rd1], %r11;
        """,
        [5, *[0] * 63],
        [11] * 32 + [121] * 32,
        {"threads": COUNT},
    ),
    # The sum of each warp, by a tree of shuffles.
    "shuffles": Program(
        OWN
        + """
        ld.global.u32 %r10, [%rd0];
        mov.u32 %r11, 16;
        $L_next:
        shfl.sync.bfly.b32 %r12|%p1, %r10, %r11, 31, -1;
        add.s32 %r10, %r10, %r12;
        shr.u32 %r11, %r11, 1;
        setp.ne.s32 %p2, %r11, 0;
        @%p2 bra $L_next;
        @!%p1 bra $L_end;
        st.global.u32 [%rd1], %r10;
        $L_end:
        """,
        NUMBERS,
        [sum(NUMBERS[:32])] * 32 + [sum(NUMBERS[32:])] * 32,
        {"threads": COUNT},
    ),
    # Each block writes a word, fences, and counts itself; the last one adds all of them. Then the
    # counter, which has wrapped to 0, and a sum by atomics. 256 bytes of out are words of blocks.
    "last block": Program(
        OWN
        + """
        mov.u32 %r20, %nctaid.x;
        ld.global.u32 %r10, [%rd0];
        st.global.u32 [%rd1], %r10;
        membar.gl;
        add.s32 %r21, %r20, -1;
        atom.global.add.u32 %r22, [%rd11+36], %r10;
        atom.global.inc.u32 %r23, [%rd11+32], %r21;
        membar.gl;
        setp.ne.s32 %p1, %r23, %r21;
        @%p1 bra $L_end;
        mov.u32 %r24, 0;
        mov.u32 %r25, 0;
        mov.u64 %rd20, %rd11;
        $L_next:
        ld.global.u32 %r26, [%rd20];
        add.s32 %r24, %r24, %r26;
        add.s64 %rd20, %rd20, 4;
        add.s32 %r25, %r25, 1;
        setp.lt.s32 %p2, %r25, %r20;
        @%p2 bra $L_next;
        st.global.u32 [%rd11+40], %r24;
        $L_end:
        """,
        NUMBERS[:8],
        [*NUMBERS[:8], 0, sum(NUMBERS[:8]), sum(NUMBERS[:8])],
        {"blocks": 8},
    ),
    # The first block writes and raises a flag, which the second one waits for.
    "acquire": Program(
        OWN
        + """
        setp.ne.s32 %p1, %r3, 0;
        @%p1 bra $L_second;
        prefetch.global.L2 [%rd10+4];
        ld.global.u32 %r10, [%rd10+4];
        st.global.cs.u32 [%rd11+4], %r10;
        membar.gl;
        atom.global.add.u32 %r11, [%rd11+8], 1;
        ret;
        $L_second:
        ld.acquire.gpu.u32 %r12, [%rd11+8];
        setp.ne.s32 %p2, %r12, 0;
        @%p2 bra $L_raised;
        nanosleep.u32 64;
        bra.uni $L_second;
        $L_raised:
        ld.global.u32 %r13, [%rd11+4];
        st.global.u32 [%rd11], %r13;
        """,
        [7, 9],
        [9, 9, 1],
        {"blocks": 2},
    ),
    # in by asynchronous copies of 16 bytes, reversed by words.
    "copies": Program(
        OWN
        + """
        shl.b32 %r10, %r0, 4;
        mul.wide.u32 %rd20, %r10, 1;
        add.s64 %rd21, %rd10, %rd20;
        add.s64 %rd22, %rd11, %rd20;
        add.s32 %r11, %r6, %r10;
        cp.async.cg.shared.global [%r11], [%rd21], 16;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r11];
        st.global.v4.u32 [%rd22], {%r23, %r22, %r21, %r20};
        """,
        NUMBERS,
        [NUMBERS[i // 4 * 4 + 3 - i % 4] for i in range(COUNT)],
        {"threads": COUNT // 4, "shared_bytes": 256},
    ),
    # Two blocks of a cluster: each reads the other's words.
    "cluster": Program(
        OWN
        + """
        ld.global.u32 %r10, [%rd0];
        st.shared.u32 [%r2], %r10;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        { .reg .b64 %tmp;
          cvt.u64.u32 %tmp, %r2;
          cvta.shared.u64 %rd20, %tmp; }
        xor.b32 %r11, %r3, 1;
        mapa.u64 %rd21, %rd20, %r11;
        ld.u32 %r12, [%rd21];
        st.global.u32 [%rd1], %r12;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        """,
        NUMBERS,
        NUMBERS[32:] + NUMBERS[:32],
        {"threads": 32, "blocks": 2, "cluster": 2, "shared_bytes": 128},
    ),
    # Vectors of two in one register, both ways.
    "vectors": Program(
        OWN
        + """
        ld.global.u32 %r10, [%rd0];
        mov.b32 {%rs1, %rs2}, %r10;
        mov.b32 %r11, {%rs2, %rs1};
        mov.b64 %rd20, {%r11, %r10};
        mov.b64 {%r12, %r13}, %rd20;
        xor.b32 %r14, %r12, %r13;
        st.global.u32 [%rd1], %r14;
        """,
        [0x12345678, 0xFFFF0000],
        [0x12345678 ^ 0x56781234, 0xFFFFFFFF],
        {"threads": 2},
    ),
}
