"""What each PTX instruction that computes a value has to give, in exact arithmetic: integers of
Python, fractions that are rounded once. Nothing here is computed by the interpreter's own means."""

from __future__ import annotations

import itertools
import math
import operator
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from tests.common.ptx_formats import BITS, FORMATS, PAIRS, decode, encode


@dataclass(frozen=True)
class Meaning:
    operands: tuple[str, ...]  # types
    result: str
    compute: Callable[..., Any]  # of decoded operands
    units: int = 0  # by which the result may be off, in the last place


def _divide(a: int, b: int) -> int:
    """Towards zero; of a division by 0, all bits are set."""
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * _divide(a, b)


INTEGERS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "neg": operator.neg,
    "div": _divide,
    "rem": _remainder,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "mov": lambda a: a,
    "cvta.to.global": lambda a: a,
}
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _exactly(type_: str, function: Callable[..., Any], down: bool = False) -> Callable[..., Any]:
    """`function` of exact operands, rounded once. Infinities, NaN and zeros follow Python's own
    floats, whose operations agree there with those of every format."""

    def compute(*values: float) -> float:
        try:
            exact = function(*map(Fraction, values))
        except (ValueError, OverflowError, ZeroDivisionError):  # not finite, or by zero
            return _special(function, values)
        if exact == 0:
            return _zero(function, values, down)
        return FORMATS[type_].round(exact, down)

    return compute


def _special(function: Callable[..., Any], values: tuple[float, ...]) -> float:
    try:
        return function(*values)
    except ZeroDivisionError:
        above, below = (1.0, values[0]) if len(values) == 1 else values
        if above == 0 or math.isnan(above):
            return math.nan
        return math.copysign(math.inf, math.copysign(1, above) * math.copysign(1, below))
    except ValueError:
        return math.nan


def _zero(function: Callable[..., Any], values: tuple[float, ...], down: bool) -> float:
    if not down:
        return function(*values)
    a, b, c = values  # a * b + c: only zeros of one sign keep it
    positive = math.copysign(1, a) * math.copysign(1, b) > 0 and math.copysign(1, c) > 0
    return 0.0 if positive and c == 0 else -0.0


def _root(a: Any) -> Any:
    if not isinstance(a, Fraction):
        return math.sqrt(a)
    if a < 0:
        raise ValueError
    with localcontext() as context:
        context.prec = 60
        return Fraction((Decimal(a.numerator) / Decimal(a.denominator)).sqrt())


def _fma(a: Any, b: Any, c: Any) -> Any:
    if isinstance(c, float) and math.isfinite(a) and math.isfinite(b) and not math.isfinite(c):
        return c  # however large a * b is
    return a * b + c


def _exp2(a: float) -> float:
    if math.isnan(a) or abs(a) == math.inf:
        return math.nan if math.isnan(a) else (0.0 if a < 0 else math.inf)
    if abs(a) > 1000:
        return 0.0 if a < 0 else math.inf
    with localcontext() as context:
        context.prec = 60
        value = Fraction(Decimal(2) ** Decimal(a))
    return 0.0 if value < Fraction(2) ** -126 else FORMATS["f32"].round(value)


def _reciprocal(a: float) -> float:
    smallest = 2.0**-126
    if abs(a) < smallest:
        return math.copysign(math.inf, a)
    right = _exactly("f32", lambda v: 1 / v)(a)
    return math.copysign(0.0, right) if abs(right) < smallest else right


FLOATS: dict[str, Callable[..., Any]] = {
    "add.rn": operator.add,
    "sub.rn": operator.sub,
    "mul.rn": operator.mul,
    "div.rn": operator.truediv,
    "rcp.rn": lambda a: 1 / a,
    "sqrt.rn": _root,
    "fma.rn": _fma,
    "fma.rm": _fma,
}


def meaning(kind: str) -> Meaning | None:
    """None: the kind does not compute a value from values."""
    if kind.startswith(("ld", "st", "atom", "mapa", "vote", "shfl", "bar", "cp", "cvta.shared")):
        return None
    name, _, type_ = kind.rpartition(".")
    if kind.startswith("cvt."):
        *rounding, result, operand = kind.split(".")[1:]
        return _conversion(rounding, result, operand)
    if type_ not in BITS and kind != "cvta.to.global.u64":
        return None
    if name == "selp":
        type_ = type_.replace("f", "b")  # of a NaN, all bits
        return Meaning((type_, type_, "pred"), type_, lambda a, b, p: a if p else b)
    if name.startswith("setp."):
        compare = COMPARISONS[name[5:7]]
        return Meaning((type_, type_), "pred", _compared(compare, name.endswith("u")))
    if name in ("shl", "shr"):
        return Meaning((type_, "u32"), type_, _left if name == "shl" else _right)
    if name == "bfi":
        return Meaning((type_, type_, "u32", "u32"), type_, _insert)
    if kind == "prmt.b32":
        return Meaning(("b32", "b32", "u32"), "b32", _permute)
    if name == "mul.wide":
        return Meaning((type_, type_), f"{type_[0]}{2 * BITS[type_]}", operator.mul)
    if name in FLOATS:
        count = FLOATS[name].__code__.co_argcount if hasattr(FLOATS[name], "__code__") else 2
        return Meaning(
            (type_,) * count, type_, _exactly(type_, FLOATS[name], down=name.endswith("rm"))
        )
    if kind == "ex2.approx.ftz.f32":
        return Meaning(("f32",), "f32", _exp2, units=2)
    if kind == "rcp.approx.ftz.f32":
        return Meaning(("f32",), "f32", _reciprocal, units=1)
    if type_ in FORMATS and name in ("neg", "abs"):
        bits, top = f"b{BITS[type_]}", 1 << (BITS[type_] - 1)
        change = (lambda a: a ^ top) if name == "neg" else (lambda a: a & ~top)
        return Meaning((bits,), bits, change)
    if name in INTEGERS:
        count = 1 if name in ("neg", "not", "mov", "cvta.to.global") else 2 + (name == "mad.lo")
        type_ = type_.replace("f", "b") if name == "mov" else type_
        return Meaning((type_,) * count, type_, INTEGERS[name])
    return None


def _compared(compare: Callable[..., bool], unordered: bool) -> Callable[..., bool]:
    def compute(a: Any, b: Any) -> bool:
        if a != a or b != b:
            return unordered
        return compare(a, b)

    return compute


def _left(a: int, by: int) -> int:
    return a << by if by < 64 else 0


def _right(a: int, by: int) -> int:
    return a >> min(by, 64)


def _insert(a: int, b: int, position: int, length: int) -> int:
    field = ((1 << (length & 255)) - 1) << (position & 255)
    return (b & ~field) | (a << (position & 255) & field)


def _permute(a: int, b: int, selection: int) -> int:
    """Of the bytes of a, then of b; a digit from 8 on takes the sign of a byte, eight times."""
    given = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    given += [255 * (byte >> 7) for byte in given]
    digits = f"{selection:08x}"[:-5:-1]
    return int.from_bytes(bytes(given[int(digit, 16)] for digit in digits), "little")


def _conversion(rounding: list[str], result: str, operand: str) -> Meaning:
    if rounding == ["sat"]:
        return Meaning((operand,), result, lambda a: min(a, 1.0) if a > 0 else 0.0)
    if result in PAIRS:
        rounded = _exactly(PAIRS[result], lambda a: a)
        return Meaning((operand, operand), result, lambda *values: tuple(map(rounded, values)))
    if result in FORMATS and operand in FORMATS:
        return Meaning((operand,), result, _exactly(result, lambda a: a))
    if result in FORMATS:
        return Meaning((operand,), result, lambda a: FORMATS[result].round(Fraction(a)))
    return Meaning((operand,), result, lambda a: a)


# ---- Operands ----

_EDGES = [0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 63, 64, 100, 255, 256, 32767, 32768, 65535, 65536]
_EDGES += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 10**12, 2**62 + 12345, 2**63 - 1]
_REALS = [0.0, 1.0, 1.5, 2.0, 3.0, 6.0, 0.1, 1 / 3, 65504.0, 65519.9, 65520.0, 5e-8, 6.1e-5, 1e-40]
_REALS += [3.4e38, 1e300, 1e-310, 88.0, 126.5, 2049.0, 2051.0, 1.00390625, 1.01171875, math.inf]


def _values(type_: str, rng: random.Random) -> list[int]:
    """Bits: what is special to the type, and random ones."""
    if type_ == "pred":
        return [0, 1]
    bits = BITS[type_]
    rest = [rng.getrandbits(bits) for _ in range(12)]
    if type_ not in FORMATS:
        edges = [e & ((1 << bits) - 1) for edge in _EDGES for e in (edge, -edge)]
        # Numbers of every size.
        rest += [rng.getrandbits(rng.randint(1, bits)) for _ in range(12)]
        return [*edges, *rest]
    form = FORMATS[type_]
    reals = [form.round(Fraction(r)) if math.isfinite(r) else r for r in _REALS]
    near = [form.round(Fraction(rng.uniform(-8, 8))) for _ in range(12)]
    return [form.encode(s) for r in [*reals, *near, math.nan] for s in (r, -r)] + rest


def operands_of(kind: str, count: int) -> list[tuple[int, ...]]:
    """`count` tuples of bits."""
    found = meaning(kind)
    assert found is not None
    rng = random.Random(kind)
    lists = [_values(type_, rng) for type_ in found.operands]
    if len(lists) == 1:
        return list(itertools.islice(itertools.cycle([(v,) for v in lists[0]]), count))
    if found.result in PAIRS:  # each value in both halves
        both = zip(itertools.cycle(lists[0]), itertools.cycle(reversed(lists[1])), strict=False)
        return list(itertools.islice(both, count))
    tuples = [tuple(rng.choice(values) for values in lists) for _ in range(count)]
    # Operands of the same size, and equal ones.
    for i in range(0, count, 8):
        if len(set(found.operands[:2])) == 1:
            tuples[i] = (tuples[i][0], tuples[i][0], *tuples[i][2:])
    return tuples


def agrees(kind: str, operands: tuple[int, ...], result: int) -> bool:
    found = meaning(kind)
    assert found is not None
    values = [decode(t, bits) for t, bits in zip(found.operands, operands, strict=True)]
    right = found.compute(*values)
    if found.result not in PAIRS:
        return _is_value(found.result, right, found.units, result)
    halves = zip(right, (result >> 16, result & 0xFFFF), strict=True)
    return all(_is_value(PAIRS[found.result], half, 0, bits) for half, bits in halves)


def _is_value(type_: str, right: Any, units: int, bits: int) -> bool:
    """Any NaN is as good as another."""
    if isinstance(right, float) and math.isnan(right):
        return math.isnan(decode(type_, bits))
    wanted = encode(type_, right)
    return abs(wanted - bits) <= units


def packed(values: list[int]) -> bytes:
    """Each in 8 bytes."""
    return struct.pack(f"<{len(values)}Q", *values)
