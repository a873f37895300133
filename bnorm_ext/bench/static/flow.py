"""The control flow of a kernel: blocks of instructions, and loops.

A loop is found by its back edge, a branch to a block that every way to the branch passes (its
head). Ways that the assumed parameters exclude are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .known import Evaluator, Values, guard_value
from .sass import Function, Instruction


@dataclass
class Block:
    """Instructions that are entered at the first and left at the last one."""

    code: list[Instruction]
    next: list[int] = field(default_factory=list)  # numbers of the blocks that may follow
    may_end: bool = False  # whether the thread may end behind it

    @property
    def address(self) -> int:
        return self.code[0].address


@dataclass
class Loop:
    head: int
    blocks: frozenset[int]
    inner: list[Loop] = field(default_factory=list)  # loops directly inside

    def own(self) -> frozenset[int]:
        """The blocks that are in no inner loop."""
        return self.blocks.difference(*(loop.blocks for loop in self.inner))


def is_branch(i: Instruction) -> bool:
    """Whether the next instruction may be another one. A call comes back."""
    return i.name in ("BRA", "EXIT", "RET", "BRX", "KILL") and "CONV" not in i.modifiers


class Flow:
    """The blocks of a function that can be reached where ``assumed`` parameters hold."""

    def __init__(self, function: Function, assumed: Mapping[int, int]) -> None:
        self.function = function
        self.blocks = _blocks(function.code)
        self._reach(Evaluator(function, assumed))
        self.loops = self._loops()

    def _reach(self, evaluator: Evaluator) -> None:
        number = {block.address: n for n, block in enumerate(self.blocks)}
        entry: dict[int, Values] = {0: {}}
        waiting = [0]
        self.reached: set[int] = set()
        while waiting:
            n = waiting.pop()
            self.reached.add(n)
            block, values = self.blocks[n], dict(entry[n])
            for i in block.code[:-1]:
                evaluator.step(i, values)
            last = block.code[-1]
            taken = guard_value(last, values) if is_branch(last) else False
            evaluator.step(last, values)
            block.may_end = taken is not False and last.name in ("EXIT", "RET")
            following = []
            if taken is not False and last.name == "BRA" and last.target is not None:
                following.append(number[last.target])
            if taken is not True and n + 1 < len(self.blocks):
                following.append(n + 1)
            for m in following:
                if m not in block.next:
                    block.next.append(m)
                if m not in entry:
                    entry[m] = dict(values)
                    waiting.append(m)
                    continue
                # What is known on all ways to the block.
                both = {r: v for r, v in entry[m].items() if values.get(r) == v}
                if both != entry[m]:
                    entry[m] = both
                    waiting.append(m)
        self.off = self._switched_off(evaluator, entry)

    def _switched_off(self, evaluator: Evaluator, entry: Mapping[int, Values]) -> frozenset[int]:
        """The addresses of instructions whose predicates the parameters make false: they are
        started, and do nothing."""
        found = set()
        for n in self.reached:
            values = dict(entry[n])
            for i in self.blocks[n].code:
                if guard_value(i, values) is False:
                    found.add(i.address)
                evaluator.step(i, values)
        return frozenset(found)

    def _loops(self) -> list[Loop]:
        """Innermost loops are inside of others' ``inner``; returns the outermost ones."""
        before: dict[int, set[int]] = {n: set() for n in self.reached}
        for n in self.reached:
            for m in self.blocks[n].next:
                before[m].add(n)
        dominators = _dominators(self.reached, before)
        bodies: dict[int, set[int]] = {}
        for n in self.reached:
            for head in self.blocks[n].next:
                if head in dominators[n]:
                    bodies.setdefault(head, {head}).update(_body(head, n, before))
        loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        loops.sort(key=lambda loop: len(loop.blocks))
        outermost: list[Loop] = []
        for k, loop in enumerate(loops):
            around = next((o for o in loops[k + 1 :] if loop.blocks < o.blocks), None)
            (outermost if around is None else around.inner).append(loop)
        return sorted(outermost, key=lambda loop: self.blocks[loop.head].address)


def _blocks(code: list[Instruction]) -> list[Block]:
    begins = {0}
    for i, following in zip(code, [*code[1:], None], strict=True):
        if is_branch(i):
            if following is not None:
                begins.add(following.address)
            if i.name == "BRA" and i.target is not None:
                begins.add(i.target)
    blocks: list[Block] = []
    for i in code:
        if i.address in begins:
            blocks.append(Block([]))
        blocks[-1].code.append(i)
    return blocks


def _dominators(nodes: set[int], before: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """For each block those that every way to it passes, itself included."""
    found = {n: set(nodes) for n in nodes}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for n in sorted(nodes - {0}):
            new = set.intersection(*(found[m] for m in before[n])) | {n}
            if new != found[n]:
                found[n] = new
                changed = True
    return found


def _body(head: int, tail: int, before: Mapping[int, set[int]]) -> set[int]:
    body, waiting = {head, tail}, [tail]
    while waiting:
        n = waiting.pop()
        if n == head:
            continue
        for m in before[n] - body:
            body.add(m)
            waiting.append(m)
    return body
