"""Which registers hold a known number, where some of the kernel's parameters are assumed.

A kernel decides once per call, by its parameters, whether there is an activation, a residual or a
mask. With these parameters assumed, the branches that test them have one way to go, and what lies
on the other way is not counted. Only the few instructions are followed that the compiler uses for
such tests; every other result is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .sass import Function, Instruction

Values = dict[str, int]  # by register, e.g. {"R4": 1, "P0": 0}; absent: unknown

#: Where a kernel's parameters begin in constant bank 0, by architecture.
PARAMETERS_AT = {75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}

_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
_REGISTER = re.compile(r"([-~|!]*)(U?[RP](?:\d+|Z|T))((?:\.\w+)*)\|?$")
_PREDICATE = re.compile(r"U?P\d+$")
_WIDE = {"WIDE", "64", "F64", "DFMA", "DADD", "DMUL"}
_COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
_NO_RESULT = {
    *("STG", "STS", "ST", "BRA", "EXIT", "BSSY", "BSYNC", "BAR", "MEMBAR", "NOP", "RET", "CALL"),
    *("ERRBAR", "CCTL", "WARPSYNC", "BRX", "RED", "LDGSTS", "LDGDEPBAR", "DEPBAR", "NANOSLEEP"),
    *("UCGABAR_ARV", "UCGABAR_WAIT", "YIELD", "KILL", "BREAK", "FCHK"),
}


class Evaluator:
    """Follows one instruction after the other.

    assumed: bytes of the kernel's parameters, by their offset. Where a byte is missing, it is
    unknown.
    """

    def __init__(self, function: Function, assumed: Mapping[int, int]) -> None:
        begin = PARAMETERS_AT[function.arch]
        self._bytes = {begin + offset: byte for offset, byte in assumed.items()}
        self._changed_by_call = _changed_by_calls(function.code)

    def constant(self, at: int, size: int) -> int | None:
        found = [self._bytes.get(at + i) for i in range(size)]
        if None in found:
            return None
        return int.from_bytes(bytes(b for b in found if b is not None), "little")

    def value(self, operand: str, values: Values, size: int = 4) -> int | None:
        """Of an operand that is a number, a parameter or a register."""
        if match := _CONSTANT.match(operand):
            return self.constant(int(match[1], 16), size)
        if re.match(r"-?0x[0-9a-f]+$", operand):
            return int(operand, 16) & 0xFFFFFFFF
        if not (match := _REGISTER.match(operand)):
            return None
        sign, register, suffix = match.groups()
        if suffix not in ("", ".reuse"):
            return None
        register = register.lstrip("U") if register.endswith(("Z", "T")) else register
        known = {"RZ": 0, "PT": 1}.get(register, values.get(register))
        if known is None or sign == "":
            return known
        if sign == "!":
            return int(not known)
        return {"-": -known, "~": ~known}.get(sign, known) & 0xFFFFFFFF

    def step(self, i: Instruction, values: Values) -> None:
        """Executes one instruction: changes ``values``."""
        runs = guard_value(i, values)
        if runs is False or i.name in _NO_RESULT or not i.operands:
            if i.name == "CALL" and runs is not False:
                for register in self._changed_by_call.get(i.target, set(values)):
                    values.pop(register, None)
            return
        results = self._results(i, values)
        for register in written_registers(i):
            new = results.get(register)
            if runs is None and values.get(register) != new:
                new = None
            if new is None:
                values.pop(register, None)
            else:
                values[register] = new

    def _results(self, i: Instruction, values: Values) -> Values:
        get = [self.value(operand, values) for operand in i.operands]
        to = i.operands[0]
        found: dict[str, int | None] = {}
        if i.name in ("MOV", "UMOV"):
            found[to] = get[1]
        elif i.name == "IMAD" and i.modifiers[:1] == ("MOV",):
            found[to] = get[3]
        elif i.name in ("LDC", "ULDC", "LDCU"):
            size = i.bits // 8
            if size <= 4:
                found[to] = self.value(i.operands[1], values, size)
            elif match := _CONSTANT.match(i.operands[1]):
                for word, register in enumerate(_consecutive(to, size // 4)):
                    found[register] = self.constant(int(match[1], 16) + 4 * word, 4)
        elif i.name == "PRMT" and len(get) == 4:
            found[to] = _permute(get[1], get[2], get[3])
        elif i.name in ("ISETP", "UISETP"):
            found.update(self._compared(i, get))
        elif i.name in ("SEL", "USEL"):
            chosen = get[3]
            found[to] = None if chosen is None else get[1] if chosen else get[2]
        elif i.name in ("LOP3", "ULOP3") and not _PREDICATE.match(to):
            found[to] = _logic32(get[1:5])
        elif i.name == "P2R" and not i.modifiers and i.operands[2] == "RZ":
            found[to] = _saved_predicates(get[3], values)
        elif i.name in ("PLOP3", "UPLOP3"):
            found[to] = _logic1(get[2:5], i.operands[5])
        return {register: value for register, value in found.items() if value is not None}

    def _compared(self, i: Instruction, get: list[int | None]) -> dict[str, int | None]:
        # ISETP.NE.U32.AND.EX P0, PT, a, b, P2, P1: P0 = (a != b) AND P2; with EX, a and b are the
        # upper words of a comparison whose lower words gave P1.
        relation = next((m for m in i.modifiers if m in _COMPARE), None)
        a, b, combined = get[2], get[3], get[4]
        result: int | None = None
        if relation is not None and a is not None and b is not None:
            if "U32" not in i.modifiers:
                a, b = _signed(a), _signed(b)
            result = int(_COMPARE[relation](a, b))
            if "EX" in i.modifiers and a == b:
                result = get[5]
        both = result if combined == 1 else None
        if "AND" in i.modifiers and (combined == 0 or result == 0):
            both = 0
        if "OR" in i.modifiers:
            both = 1 if 1 in (combined, result) else result if combined == 0 else None
        return {i.operands[0]: both}


def guard_value(i: Instruction, values: Values) -> bool | None:
    """Whether an instruction executes; None where that is unknown."""
    if i.guard is None:
        return True
    known = 1 if i.guard in ("PT", "UPT") else values.get(i.guard)
    return None if known is None else bool(known) != i.negated


def _signed(a: int) -> int:
    return a - (1 << 32) if a & 0x80000000 else a


def _permute(a: int | None, selector: int | None, b: int | None) -> int | None:
    # Byte k of the result is byte (selector >> 4 * k) & 7 of b:a, its sign where bit 3 is set. Only
    # what is selected has to be known.
    if selector is None:
        return None
    result = 0
    for k in range(4):
        nibble = selector >> 4 * k & 0xF
        word = b if nibble & 4 else a
        if word is None:
            return None
        byte = word >> 8 * (nibble & 3) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * k
    return result


def _saved_predicates(mask: int | None, values: Values) -> int | None:
    """Bit k is predicate k, where the mask has that bit."""
    if mask is None:
        return None
    result = 0
    for k in (k for k in range(7) if mask >> k & 1):
        predicate = values.get(f"P{k}")
        if predicate is None:
            return None
        result |= predicate << k
    return result


def _logic32(operands: list[int | None]) -> int | None:
    a, b, c, table = operands
    if a is None or b is None or c is None or table is None:
        return None
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


def _logic1(operands: list[int | None], table: str) -> int | None:
    if not table.startswith("0x"):
        return None
    choices: list[list[int]] = [[0, 1] if o is None else [o] for o in operands]
    bits = {
        int(table, 16) >> (a * 4 + b * 2 + c) & 1
        for a in choices[0]
        for b in choices[1]
        for c in choices[2]
    }
    return bits.pop() if len(bits) == 1 else None


def _consecutive(register: str, count: int) -> list[str]:
    match = re.match(r"(U?R)(\d+)$", register)
    return [f"{match[1]}{int(match[2]) + k}" for k in range(count)] if match else []


def _changed_by_calls(code: Sequence[Instruction]) -> dict[int | None, set[str]]:
    """By the address that is called: the registers that the code from there to the next return
    may change. These are the compiler's own subroutines, of a few lines each."""
    changed: dict[int | None, set[str]] = {}
    for target in {i.target for i in code if i.name == "CALL" and i.target is not None}:
        registers = changed[target] = set()
        for i in code:
            if i.address >= target:
                registers.update(written_registers(i))
                if i.name == "RET":
                    break
    return changed


def written_registers(i: Instruction) -> list[str]:
    """The registers whose values an instruction may change."""
    registers = []
    for position, operand in enumerate(i.operands[:2]):
        if _PREDICATE.match(operand):
            registers.append(operand)
        elif position == 0 and re.match(r"U?R\d+$", operand):
            wide = i.name.startswith("D") or _WIDE & set(i.modifiers) or i.name == "CS2R"
            count = 4 if "128" in i.modifiers else 2 if wide else 1
            registers += _consecutive(operand, count)
        else:
            # A second destination is a predicate behind the first one, as in IADD3 R8, P2, R4, R6.
            break
    if i.name == "IADD3" and len(i.operands) > 2 and _PREDICATE.match(i.operands[2]):
        registers.append(i.operands[2])
    return registers
