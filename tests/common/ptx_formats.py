"""The types of PTX values, and their bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Format:
    """A floating-point format: bits of its significand, of the whole, its exponents' range."""

    digits: int
    bits: int
    highest: int  # exponent of numbers in [1, 2) is 0

    def round(self, value: Fraction, down: bool = False) -> float:
        """To nearest, ties to even, or towards negative infinity; as a float of Python."""
        if value == 0:
            return 0.0
        size = abs(value)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        if Fraction(2) ** exponent > size:
            exponent -= 1
        unit = Fraction(2) ** (max(exponent, 1 - self.highest) - self.digits + 1)
        count = math.floor(value / unit) if down else round(value / unit)
        largest = (2 - Fraction(2) ** (1 - self.digits)) * Fraction(2) ** self.highest
        if abs(count * unit) > largest:
            is_infinite = value < 0 or not down
            return (-1 if value < 0 else 1) * (math.inf if is_infinite else float(largest))
        return math.copysign(float(count * unit), -1 if value < 0 else 1)

    def encode(self, value: float) -> int:
        """The bits of a number of this format."""
        sign = (1 if math.copysign(1, value) < 0 else 0) << (self.bits - 1)
        stored = self.digits - 1
        top = (2 * self.highest + 1) << stored  # of infinity
        if math.isnan(value):
            return top | 1 << (stored - 1)
        if math.isinf(value):
            return sign | top
        if value == 0:
            return sign
        mantissa, exponent = math.frexp(abs(value))  # in [0.5, 1)
        biased = exponent - 1 + self.highest
        if biased <= 0:  # a denormal
            return sign | int(math.ldexp(abs(value), self.highest - 1 + stored))
        return sign | biased << stored | int(math.ldexp(mantissa, self.digits)) - (1 << stored)

    def decode(self, bits: int) -> float:
        stored = self.digits - 1
        sign = -1.0 if bits >> (self.bits - 1) else 1.0
        biased = bits >> stored & (2 * self.highest + 1)
        mantissa = bits & ((1 << stored) - 1)
        if biased == 2 * self.highest + 1:
            return math.nan if mantissa else sign * math.inf
        if biased == 0:
            return sign * math.ldexp(mantissa, 1 - self.highest - stored)
        return sign * math.ldexp(mantissa + (1 << stored), biased - self.highest - stored)


FORMATS = {
    "f16": Format(11, 16, 15),
    "bf16": Format(8, 16, 127),
    "f32": Format(24, 32, 127),
    "f64": Format(53, 64, 1023),
}
#: Words of two numbers.
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
BITS = {"pred": 1} | {f"{kind}{n}": n for kind in "busf" for n in (16, 32, 64)}
BITS |= {"bf16": 16} | dict.fromkeys(PAIRS, 32)


def decode(type_: str, bits: int) -> Any:
    if type_ in FORMATS:
        return FORMATS[type_].decode(bits)
    if type_[0] == "s" and bits >> (BITS[type_] - 1):
        return bits - (1 << BITS[type_])
    return bits


def encode(type_: str, value: Any) -> int:
    if type_ in FORMATS:
        return FORMATS[type_].encode(value)
    return int(value) & ((1 << BITS[type_]) - 1)
