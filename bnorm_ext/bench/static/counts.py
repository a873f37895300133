"""Instructions of one pass through a loop, by the unit of the multiprocessor that executes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .flow import Flow, Loop, is_branch
from .known import written_registers
from .sass import Instruction

#: Executed by the FP64 pipe.
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
_MEMORY = {
    "LDG": "global loads",
    "STG": "global stores",
    "LDS": "shared loads",
    "STS": "shared stores",
    "LDGSTS": "asynchronous copies",
}


def unit(i: Instruction) -> str:
    """fp64, conversions (from and to 64 bits, between float32 and 16 bits, or others), special
    functions, a kind of memory access, or other. bfloat16 becomes float32 by a shift, which is
    other."""
    if i.name in _FP64:
        return "fp64"
    if i.name in ("F2F", "F2I", "I2F", "FRND"):
        return "conversions64" if {"F64", "S64", "U64"} & set(i.modifiers) else "conversions"
    if i.name == "F2FP" or (i.name == "HADD2" and "F32" in i.modifiers):
        return "conversions16"
    if i.name == "MUFU":
        return "special"
    return _MEMORY.get(i.name, "other")


@dataclass(frozen=True)
class Pass:
    """One pass through a loop, every vector valid, or through the rest of a kernel once."""

    code: tuple[Instruction, ...]
    off: frozenset[int] = frozenset()  # addresses of those that do nothing (Flow.off)

    @property
    def instructions(self) -> int:
        return len(self.code)

    def by_unit(self) -> Counter[str]:
        return Counter(unit(i) for i in self.code)

    def accesses(self, name: str, bits: int) -> int:
        """How many accesses of this kind and width there are, e.g. ("LDG", 128)."""
        those = [i for i in self.code if i.address not in self.off]
        return sum(i.name == name and i.bits == bits for i in those)


_NEVER = 1_000_000  # instructions

#: Predicates that the branches taken so far have decided, e.g. ("P4", True).
_Decided = frozenset[tuple[str, bool]]


def loop_pass(flow: Flow, loop: Loop, wanted: Sequence[str], bits: int) -> Pass:
    """The way through a loop, from its head back to it, with the most accesses of the ``wanted``
    kinds and of ``bits`` bits, so that every vector of a batch is valid; among those the longest
    one without a call: calls are the compiler's slow ways for rare values, as in a division. Two
    branches on the same predicate go the same way. Inner loops are left out."""
    inside = frozenset[int]().union(*(inner.blocks for inner in loop.inner))
    # By block and what is decided when it is entered: accesses, instructions, the way.
    best: dict[int, dict[_Decided, tuple[int, int, tuple[int, ...]]]] = {
        loop.head: {frozenset(): (0, 0, ())}
    }
    ends: list[tuple[int, int, tuple[int, ...]]] = []
    order = {n: k for k, n in enumerate(_order(flow, loop))}
    for n in order:
        code = [] if n in inside else flow.blocks[n].code
        found = sum(i.name in wanted and i.bits == bits and i.address not in flow.off for i in code)
        cost = -_NEVER if any(i.name == "CALL" for i in code) else len(code)
        for decided, (accesses, length, way) in best.get(n, {}).items():
            reached = (accesses + found, length + cost, (*way, n))
            for m, then in _onwards(flow, n, decided):
                if m == loop.head:
                    ends.append(reached)
                elif order.get(m, 0) > order[n]:  # no back edge of an inner loop
                    known = best.setdefault(m, {})
                    if then not in known or known[then][:2] < reached[:2]:
                        known[then] = reached
    way = max(ends, key=lambda end: end[:2])[2]
    return Pass(tuple(i for n in way if n not in inside for i in flow.blocks[n].code), flow.off)


def _onwards(flow: Flow, n: int, decided: _Decided) -> list[tuple[int, _Decided]]:
    """The blocks that may follow, each with what is decided then."""
    block = flow.blocks[n]
    written = {register for i in block.code for register in written_registers(i)}
    decided = frozenset(pair for pair in decided if pair[0] not in written)
    last = block.code[-1]
    if not is_branch(last) or last.guard is None:
        return [(m, decided) for m in block.next]
    known = dict(decided)
    ways = []
    for m in block.next:
        taken = last.name == "BRA" and flow.blocks[m].address == last.target
        value = taken != last.negated  # of the predicate
        if known.get(last.guard, value) == value:
            ways.append((m, decided | {(last.guard, value)}))
    return ways


def _order(flow: Flow, loop: Loop) -> Iterable[int]:
    """The blocks of a loop, each behind those that lead to it but for back edges."""
    done: list[int] = []
    seen: set[int] = set()

    def visit(n: int) -> None:
        seen.add(n)
        for m in flow.blocks[n].next:
            if m in loop.blocks and m not in seen and m != loop.head:
                visit(m)
        done.append(n)

    visit(loop.head)
    return reversed(done)


def straight_pass(flow: Flow, through: Sequence[Loop]) -> Pass:
    """The shortest way from the kernel's first instruction to its end that passes the heads of all
    the given loops, with one pass through the loops around them and none through the given ones."""
    heads = {loop.head for loop in through}
    inside = {n for loop in through for n in loop.blocks}
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {}
    for n in _forward_order(flow):
        ways = [best[m] for m in flow.reached if n in flow.blocks[m].next and m in best]
        if n != 0 and not ways:
            continue
        met, length, way = max(ways, default=(0, 0, ()), key=lambda w: w[:2])
        cost = 0 if n in inside else len(flow.blocks[n].code)
        best[n] = met + (n in heads), length - cost, (*way, n)
    ends = [best[n] for n in best if flow.blocks[n].may_end]
    way = max(ends, key=lambda w: w[:2])[2]
    return Pass(tuple(i for n in way if n not in inside for i in flow.blocks[n].code))


def _forward_order(flow: Flow) -> Iterable[int]:
    done: list[int] = []
    seen: set[int] = set()
    stack: list[tuple[int, int]] = [(0, 0)]
    seen.add(0)
    while stack:
        n, k = stack.pop()
        following = flow.blocks[n].next
        if k < len(following):
            stack.append((n, k + 1))
            if following[k] not in seen:
                seen.add(following[k])
                stack.append((following[k], 0))
        else:
            done.append(n)
    return reversed(done)
