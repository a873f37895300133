"""Questions about code that tracing cannot answer, because the code does not call anything that
would tell: answered from its instructions."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Instructions between which the value on top of the stack stays what it is.
_IDLE = (
    "CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "PUSH_NULL", "PRECALL", "RESUME", "COPY",
    "DUP_TOP",
)  # fmt: skip
_KINDS = ("isinstance", "issubclass", "hasattr", "getattr")
_READS_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
_ABSENT: Any = object()


@functools.cache
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(i for i in dis.get_instructions(code) if i.opname not in _IDLE)


def _locals(instruction: dis.Instruction) -> tuple[str, ...]:
    """The names of the local variables that it puts on the stack, or has taken from there: one
    instruction may do two."""
    if not instruction.opname.startswith(("LOAD_FAST", "STORE_FAST")):
        return ()
    name = instruction.argval
    return name if isinstance(name, tuple) else (name,)


def _local(instruction: dis.Instruction) -> str | None:
    """The last of these, on top of the stack."""
    return (_locals(instruction) or (None,))[-1]


@functools.cache
def handles_exceptions(code: types.CodeType) -> bool:
    """Whether the code has an ``except``."""
    operations = [instruction.opname for instruction in _instructions(code)]
    # Where an exception is over. It also is at the end of a ``with`` that swallows it.
    over = sum(
        this == "POP_EXCEPT" and after != "RERAISE"
        for this, after in zip(operations, [*operations[1:], ""], strict=True)
    )
    return over > operations.count("WITH_EXCEPT_START")


@functools.cache
def asks_for_types(code: types.CodeType) -> bool:
    """Whether the code asks for the exact class of something, by ``type(x)`` or ``x.__class__``.
    Reading an attribute of the class does not count: that of a fused class is the same."""
    found = _instructions(code)
    return any(
        after >= len(found) or not found[after].opname.startswith(_READS_ATTRIBUTE)
        for _, after in _questions_for_types(found)
    )


def _questions_for_types(
    found: tuple[dis.Instruction, ...],
) -> Iterator[tuple[str | None, int]]:
    """The local variable of which a class is asked for, None for an expression; and the number of
    the instruction that gets the class."""
    for i, instruction in enumerate(found):
        operation, name = instruction.opname, instruction.argval
        if operation == "LOAD_ATTR" and name == "__class__":
            yield _local(found[i - 1]), i + 1
        if operation in ("LOAD_GLOBAL", "LOAD_NAME") and name == "type":
            simple = i + 2 < len(found) and found[i + 2].opname.startswith("CALL")
            # Of an expression the end is not looked for: it counts as a question.
            yield (_local(found[i + 1]), i + 3) if simple else (None, len(found))


@functools.cache
def compares_identity(code: types.CodeType, offset: int) -> bool:
    """Whether the code goes on, from the instruction at this offset, by comparing its result by
    ``is``: with None, or with the value of a name."""
    after = (i for i in _instructions(code) if i.offset > offset)
    for instruction in after:
        operation = instruction.opname
        if operation == "IS_OP" or "IF_NONE" in operation or "IF_NOT_NONE" in operation:
            return True
        if not operation.startswith("LOAD_"):
            return False
    return False


@dataclass(frozen=True)
class Questions:
    """What some code asks of its values."""

    #: Local variables that it compares by ``is`` with something but None.
    same: frozenset[str] = frozenset()
    none: frozenset[str] = frozenset()  #: local variables that it compares with None
    #: Whether it compares results of calls and subscripts, without a name, with None.
    none_of_results: bool = False
    types: frozenset[str] = frozenset()  #: local variables of which it asks for the class
    #: Local variables that it asks by isinstance, hasattr or getattr.
    kinds: frozenset[str] = frozenset()
    kinds_of_others: bool = False  #: whether it asks so of anything but a local variable

    def __bool__(self) -> bool:
        return self != Questions()


@functools.cache
def questions(code: types.CodeType) -> Questions:
    """What the code asks of its values."""
    found = _instructions(code)
    same: set[str] = set()
    names, results = set(), False
    for i, instruction in enumerate(found):
        if "IF_NONE" in instruction.opname or "IF_NOT_NONE" in instruction.opname:
            operand = found[i - 1]
        elif instruction.opname == "IS_OP" and _is_none(found[i - 1]):
            operand = found[i - 2]
        elif instruction.opname == "IS_OP":
            same |= {name for operand in found[max(i - 2, 0) : i] for name in _locals(operand)}
            continue
        else:
            continue
        name = _local(operand)
        if name is not None:
            names.add(name)
        results |= operand.opname.startswith(("CALL", "BINARY_SUBSCR", "BINARY_OP"))
    asked = (name for name, _ in _questions_for_types(found) if name is not None)
    kinds = [
        () if found[i + 2].opname.startswith(_READS_ATTRIBUTE) else _locals(found[i + 1])
        for i, instruction in enumerate(found[:-2])
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in _KINDS
    ]
    return Questions(
        frozenset(same), frozenset(names), results, frozenset(asked),
        frozenset(name for operand in kinds for name in operand), () in kinds,
    )  # fmt: skip


def _is_text(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str)


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("LOAD_CONST", "RETURN_CONST") and instruction.argval is None


@functools.cache
def may_return_none(code: types.CodeType) -> bool:
    """Whether the code may return None, for all that its own constants tell."""
    found = _instructions(code)
    following = (*found[1:], None)
    return any(
        _is_none(this) and (after is None or after.opname != "IS_OP")
        for this, after in zip(found, following, strict=True)
    )


@functools.cache
def computes_names(code: types.CodeType) -> bool:
    """Whether the code may read attributes by names that it does not contain."""
    if not {"attrgetter", "vars", "__dict__", "__getattribute__", "dir"}.isdisjoint(code.co_names):
        return True
    found = _instructions(code)
    for i, instruction in enumerate(found):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval == "getattr":
            after = i + 2  # the object
            while found[after].opname == "LOAD_ATTR":
                after += 1
            rest = itertools.takewhile(lambda i: not i.opname.startswith("CALL"), found[after:])
            # A name that is a constant is followed by a default value at most.
            if len(list(rest)) > 2 or not _is_text(found[after]):
                return True
    return False


def references(
    code: types.CodeType, scope: Mapping[str, Any], cells: Mapping[str, Any]
) -> Iterator[tuple[Any, str]]:
    """What the code reads by name from Python modules and classes: pairs of module or class, and
    name. ``a.b.c`` is three of them where ``a`` and ``a.b`` are modules or classes. Instead of the
    module it is ``scope`` where that is no module's, as for code that was run by ``exec``.

    Args:
        code: the code.
        scope: its global variables.
        cells: its variables of enclosing functions.
    """
    here: Any = sys.modules.get(str(scope.get("__name__")))
    if here is None or vars(here) is not scope:
        here = scope
    value: Any = _ABSENT
    for instruction in _instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = scope.get(name, _ABSENT)
            if value is not _ABSENT:
                yield here, name
        elif operation == "LOAD_DEREF":
            value = cells.get(name, _ABSENT)
        elif operation == "IMPORT_NAME":
            value = sys.modules.get(name, _ABSENT)
            yield from _names_in(value, code)
        elif operation == "IMPORT_FROM":
            yield from _names_in(looked_up(value, name), code)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD") and _is_namespace(value):
            yield value, name
            value = looked_up(value, name)
        else:
            value = _ABSENT


def enclosing_cells(function: types.FunctionType) -> Iterator[tuple[str, types.CellType]]:
    """The function's variables of enclosing functions, those that have a value."""
    cells = function.__closure__ or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            _ = cell.cell_contents
        except ValueError:
            continue
        yield name, cell


def _is_namespace(value: Any) -> bool:
    return isinstance(value, types.ModuleType | type)


def looked_up(holder: Any, name: str) -> Any:
    """What a module, a class or a dictionary of globals has under this name, or None."""
    if isinstance(holder, dict):
        return holder.get(name)
    if isinstance(holder, types.ModuleType):
        return vars(holder).get(name)
    return getattr(holder, name, None)


def _names_in(module: Any, code: types.CodeType) -> Iterator[tuple[Any, str]]:
    """What the code may read from a module that it imports itself."""
    if isinstance(module, types.ModuleType):
        yield from ((module, name) for name in code.co_names if name in vars(module))
