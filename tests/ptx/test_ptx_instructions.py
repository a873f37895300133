"""Each kind of instruction that the PTX interpreter knows: those that compute against exact
arithmetic, those that access memory against the bytes, the others by small programs."""

from __future__ import annotations

import itertools
import random
import re
import struct

import pytest

from cuda_emulator import building, ptx
from tests.common import ptx_programs
from tests.common.ptx_formats import BITS
from tests.common.ptx_values import agrees, meaning, operands_of, packed

if building.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

THREADS = 128
KINDS = ptx.known_kinds()
COMPUTING = [kind for kind in KINDS if meaning(kind)]
ACCESSES = [kind for kind in KINDS if re.match(r"(ld|st)\.(?!acquire)", kind)]
SLOT = 8  # bytes of each operand and result


def register(type_: str, number: int) -> str:
    if type_ == "pred":
        return f"%p{number}"
    names = {"f32": "%f", "f64": "%fd"}
    return names.get(type_, {16: "%rs", 32: "%r", 64: "%rd"}[BITS[type_]]) + str(number)


def loaded(type_: str, number: int, address: str) -> str:
    if type_ == "pred":
        return f"ld.global.u32 %r9, {address};\nsetp.ne.u32 %p{number}, %r9, 0;\n"
    return f"ld.global.b{BITS[type_]} {register(type_, number)}, {address};\n"


def stored(type_: str, number: int, address: str) -> str:
    if type_ == "pred":
        return f"selp.u32 %r9, 1, 0, %p{number};\nst.global.u32 {address}, %r9;\n"
    return f"st.global.b{BITS[type_]} {address}, {register(type_, number)};\n"


@pytest.fixture(scope="module")
def computed() -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """Of each kind: operands and result, as bits; one thread for each tuple of operands."""
    body, given = "", []
    tuples = {kind: operands_of(kind, THREADS) for kind in COMPUTING}
    for i, kind in enumerate(COMPUTING):
        found = meaning(kind)
        assert found is not None
        for j, type_ in enumerate(found.operands):
            body += loaded(type_, j, f"[%rd10+{(4 * i + j) * THREADS * SLOT}]")
        operands = ", ".join(register(t, j) for j, t in enumerate(found.operands))
        body += f"{kind} {register(found.result, 5)}, {operands};\n"
        body += stored(found.result, 5, f"[%rd11+{i * THREADS * SLOT}]")
        for j in range(4):
            given += [t[j] if j < len(t) else 0 for t in tuples[kind]]
    head = "mov.u32 %r10, %tid.x;\nmul.wide.u32 %rd12, %r10, 8;\n"
    head += "add.s64 %rd10, %rd10, %rd12;\nadd.s64 %rd11, %rd11, %rd12;\n"
    count = len(COMPUTING) * THREADS
    text = ptx_programs.program(head + body)
    out = ptx.run_program(text, packed(given), count * SLOT, threads=THREADS)
    results = struct.unpack(f"<{count}Q", out)
    return {
        kind: list(zip(tuples[kind], results[i * THREADS : (i + 1) * THREADS], strict=True))
        for i, kind in enumerate(COMPUTING)
    }


@pytest.mark.parametrize("kind", COMPUTING)
def test_computes(computed: dict[str, list[tuple[tuple[int, ...], int]]], kind: str) -> None:
    wrong = [
        f"{kind} of {[hex(o) for o in operands]} is {result:#x}"
        for operands, result in computed[kind]
        if not agrees(kind, operands, result)
    ]
    assert not wrong, wrong[:5]


def test_operands_beyond_32_bits(computed: dict[str, list[tuple[tuple[int, ...], int]]]) -> None:
    """Which the tests of the kernels never divide, as far as their shapes go."""
    for kind in ("div.s64", "div.u64", "rem.s64", "rem.u64"):
        wide = [o for o, _ in computed[kind] if o[0] >> 32 and o[1] >> 32]
        assert len(wide) > 20
        assert len({result for operands, result in computed[kind] if operands in wide}) > 4


def elements(kind: str) -> tuple[int, int, bool]:
    """Count, bytes, and whether the sign is extended."""
    *_, vector, type_ = kind.split(".")
    count = int(vector[1]) if re.fullmatch(r"v[24]", vector) else 1
    return count, int(type_[1:]) // 8, type_[0] == "s"


def access_program(kinds: list[str]) -> str:
    """Each kind loads from, or stores to, 16 bytes of its own of the input or the output."""
    body = ""
    for i, kind in enumerate(kinds):
        count, size, _ = elements(kind)
        wide = size == 8
        names = [f"{'%rd' if wide else '%r'}{20 + j}" for j in range(count)]
        vector = names[0] if count == 1 else "{" + ", ".join(names) + "}"
        word = "u64" if wide else "u32"
        space = kind.split(".")[1] if kind.split(".")[1] in ("global", "shared", "param") else ""
        at = 32 * i
        if kind.startswith("ld"):
            # The input goes to shared memory first, where that is read.
            source = {"global": f"[%rd10+{at}]", "param": "[program_param_0]"}.get(space)
            if source is None:
                body += f"ld.global.v2.u64 {{%rd30, %rd31}}, [%rd10+{at}];\n"
                body += f"st.shared.v2.u64 [%r12+{at}], {{%rd30, %rd31}};\n"
                source = f"[%r12+{at}]" if space else f"[%rd14+{at}]"
            body += f"{kind} {vector}, {source};\n"
            for j, name in enumerate(names):
                body += f"st.global.{word} [%rd11+{at + j * (8 if wide else 4)}], {name};\n"
        else:
            for j, name in enumerate(names):
                body += f"ld.global.{word} {name}, [%rd10+{at + j * (8 if wide else 4)}];\n"
            body += f"{kind} [{'%r12' if space == 'shared' else '%rd11'}+{at}], {vector};\n"
            if space == "shared":
                for j in range(count * size):
                    body += f"ld.shared.u8 %r9, [%r12+{at + j}];\n"
                    body += f"st.global.u8 [%rd11+{at + j}], %r9;\n"
    head = "mov.u32 %r12, memory;\ncvt.u64.u32 %rd13, %r12;\ncvta.shared.u64 %rd14, %rd13;\n"
    return ptx_programs.program(head + body)


@pytest.fixture(scope="module")
def accessed() -> dict[str, tuple[bytes, bytes]]:
    """Of each kind: its part of the input and of the output."""
    given = random.Random(1).randbytes(32 * len(ACCESSES))
    text = access_program(ACCESSES)
    out = ptx.run_program(text, given, len(given), shared_bytes=len(given))
    parts = [slice(32 * i, 32 * (i + 1)) for i in range(len(ACCESSES))]
    return {k: (given[part], out[part]) for k, part in zip(ACCESSES, parts, strict=True)}


@pytest.mark.parametrize("kind", ACCESSES)
def test_accesses(accessed: dict[str, tuple[bytes, bytes]], kind: str) -> None:
    given, out = accessed[kind]
    count, size, is_signed = elements(kind)
    word = max(size, 4)
    if kind.startswith("st"):
        right = b"".join(given[j * word : j * word + size] for j in range(count))
    else:
        if ".param" in kind:  # addresses: those that a load of 16 bytes has
            given = accessed["ld.param.v2.u64"][1]
        parts = [given[j * size : (j + 1) * size] for j in range(count)]
        values = [int.from_bytes(part, "little", signed=is_signed) for part in parts]
        right = b"".join(value.to_bytes(word, "little", signed=is_signed) for value in values)
    assert out[: len(right)] == right
    assert not any(out[len(right) :])


@pytest.mark.parametrize("name", ptx_programs.PROGRAMS)
def test_program(name: str) -> None:
    """Control flow and what threads do together, under several orders of threads."""
    p = ptx_programs.PROGRAMS[name]
    given = struct.pack(f"<{len(p.given)}I", *p.given)
    for seed in range(4):
        out = ptx.run_program(
            ptx_programs.program(p.body), given, 4 * len(p.right), **p.launch, seed=seed
        )
        assert list(struct.unpack(f"<{len(p.right)}I", out)) == p.right, seed


def test_every_kind_is_tested(tmp_path) -> None:
    """Of the kinds that the small programs are for, each is in one of them."""
    found = {*COMPUTING, *ACCESSES}
    for p in ptx_programs.PROGRAMS.values():
        file = tmp_path / "program.ptx"
        file.write_text(ptx_programs.program(p.body))
        found |= {kind for _, _, kind in ptx.listed(file)}
    assert not set(KINDS) - found


def test_names_are_listed_once() -> None:
    assert [kind for kind, group in itertools.groupby(KINDS) if len(list(group)) > 1] == []
