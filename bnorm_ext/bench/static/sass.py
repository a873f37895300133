"""SASS, the machine code of NVIDIA GPUs, as cuobjdump prints it.

A line with an instruction reads ``/*0a80*/ @P0 BRA 0xb00 ;``: address, guard, opcode with its
modifiers, operands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_FUNCTION = re.compile(r"\s+Function : (\S+)")
_USAGE = re.compile(r"\s*Function (\S+):$")
_REGISTERS = re.compile(r"\s*REG:(\d+) ")
_ARCH = re.compile(r"\s*code for sm_(\d+)")
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z]\w*)(\S*)\s*(.*?)\s*;"
)
_CONDITION = re.compile(r"(!?)(U?P\w+)$")


@dataclass(frozen=True)
class Instruction:
    address: int  # in bytes, from the beginning of the function
    guard: str | None  # the predicate register under which it executes, or None: always
    negated: bool  # whether it executes where the guard is false
    name: str  # without modifiers, e.g. LDG
    modifiers: tuple[str, ...]  # e.g. ("E", "128")
    operands: tuple[str, ...]

    @property
    def bits(self) -> int:
        """Of a memory access, per thread."""
        for modifier in self.modifiers:
            if modifier in ("128", "64"):
                return int(modifier)
            if modifier in ("U16", "S16"):
                return 16
            if modifier in ("U8", "S8"):
                return 8
        return 32

    @property
    def target(self) -> int | None:
        """Where a direct branch or call goes."""
        for operand in reversed(self.operands):
            if operand.startswith("0x"):
                return int(operand, 16)
        return None

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        opcode = ".".join((self.name, *self.modifiers))
        return f"{self.address:04x} {guard}{opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Function:
    name: str  # mangled
    arch: int  # 80 for sm_80
    registers: int = 0  # of a thread
    code: list[Instruction] = field(default_factory=list)


def _split(operands: str) -> Iterator[str]:
    """At commas, but not at those in brackets."""
    depth, begin = 0, 0
    for i, letter in enumerate(operands):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            yield operands[begin:i].strip()
            begin = i + 1
    if operands[begin:].strip():
        yield operands[begin:].strip()


def parse(listing: str) -> list[Function]:
    """The functions in the output of ``cuobjdump -sass`` and, where that is there too, the
    registers that ``cuobjdump -res-usage`` says they take."""
    functions: list[Function] = []
    registers: dict[str, int] = {}
    arch, used_by = 0, ""
    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            address, negated, guard, name, modifiers, listed = match.groups()
            operands = tuple(_split(listed))
            # BRA.U !UP0, 0xb00: the condition of a branch that is uniform over the warp.
            if name == "BRA" and guard is None and (condition := _CONDITION.match(operands[0])):
                negated, guard = condition.groups()
                operands = operands[1:]
            functions[-1].code.append(
                Instruction(
                    int(address, 16),
                    # PT is always true.
                    None if guard in ("PT", "UPT") and not negated else guard,
                    bool(negated),
                    name,
                    tuple(m for m in modifiers.split(".") if m),
                    operands,
                )
            )
        elif match := _FUNCTION.match(line):
            functions.append(Function(match[1], arch))
        elif match := _ARCH.match(line):
            arch = int(match[1])
        elif match := _USAGE.match(line):
            used_by = match[1]
        elif match := _REGISTERS.match(line):
            registers[used_by] = int(match[1])
    for function in functions:
        function.registers = registers.get(function.name, 0)
        function.code = [_as_jump(i, function.code) for i in function.code]
    return functions


def _as_jump(i: Instruction, code: list[Instruction]) -> Instruction:
    """The compiler also leaves loops by a call, which does not come back: what is called goes on to
    the end of the kernel. That is a branch."""
    if i.name != "CALL" or i.target is None:
        return i
    called = (j for j in code if j.address >= i.target and j.guard is None)
    end = next((j for j in called if j.name in ("EXIT", "RET")), None)
    return replace(i, name="BRA") if end is not None and end.name == "EXIT" else i
