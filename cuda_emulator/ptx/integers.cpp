// Integers, bits and predicates. Computed without signs where the result has the same bits, because
// signed overflow is undefined in C++ and wraps here.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "values.h"

namespace emulator {
namespace ptx {
namespace {

template <typename T>
T add(T a, T b) {
  return a + b;
}
template <typename T>
T subtract(T a, T b) {
  return a - b;
}
template <typename T>
T multiply(T a, T b) {
  return a * b;
}
template <typename T>
T multiply_add(T a, T b, T c) {
  return a * b + c;
}
template <typename T>
T negate(T a) {
  return T{0} - a;
}
// The whole product, of twice the width.
template <typename Wide, typename T>
Wide multiply_wide(T a, T b) {
  return static_cast<Wide>(a) * static_cast<Wide>(b);
}

// Of a division by 0, PTX leaves the result open; GPUs give all ones, and the dividend as remainder.
// The lowest number by -1 wraps to itself.
template <typename T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed<T>::value && b == static_cast<T>(-1)) {
    return static_cast<T>(negate(static_cast<std::make_unsigned_t<T>>(a)));
  }
  return a / b;
}
template <typename T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed<T>::value && b == static_cast<T>(-1)) return 0;
  return a % b;
}

template <typename T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <typename T>
T maximum(T a, T b) {
  return std::max(a, b);
}

template <typename T>
T bit_and(T a, T b) {
  return a & b;
}
template <typename T>
T bit_or(T a, T b) {
  return a | b;
}
template <typename T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <typename T>
T bit_not(T a) {
  return ~a;
}
bool predicate_and(bool a, bool b) {
  return a && b;
}
bool predicate_or(bool a, bool b) {
  return a || b;
}
bool predicate_xor(bool a, bool b) {
  return a != b;
}
bool predicate_not(bool a) {
  return !a;
}

// The lowest `length` bits of a in place of those of b from `position` on; what goes beyond the width
// is left out. Of both numbers a byte counts.
template <typename T>
T insert_bits(T a, T b, u32 position, u32 length) {
  constexpr u32 kWidth = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (position >= kWidth || length == 0) return b;
  const T ones = length >= kWidth ? static_cast<T>(-1) : static_cast<T>((T{1} << length) - 1);
  return (b & ~(ones << position)) | (a & ones) << position;
}

// Four bytes of the eight of b and a, those of a being 0 to 3: each of the selection's four lowest
// hexadecimal digits names one by its lowest three bits; with bit 3 its sign alone, eight times.
u32 permute(u32 a, u32 b, u32 selection) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 digit = selection >> 4 * i & 15;
    u32 byte = static_cast<u32>(bytes >> 8 * (digit & 7)) & 0xff;
    if (digit > 7) byte = byte > 0x7f ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// Shifts by the width or more leave nothing, or only the sign.
template <typename T>
T shift_left(T a, u32 by) {
  return by < 8 * sizeof(T) ? a << by : T{0};
}
template <typename T>
T shift_right(T a, u32 by) {
  constexpr u32 kLast = 8 * sizeof(T) - 1;
  if (std::is_signed<T>::value) return a >> std::min(by, kLast);
  return by <= kLast ? a >> by : T{0};
}

template <typename T>
bool ne(T a, T b) {
  return a != b;
}

template <typename T>
void add_comparisons(std::vector<Kind>& kinds, const std::string& type) {
  add_operation<eq<T>>(kinds, "setp.eq" + type);
  add_operation<ne<T>>(kinds, "setp.ne" + type);
  add_operation<lt<T>>(kinds, "setp.lt" + type);
  add_operation<le<T>>(kinds, "setp.le" + type);
  add_operation<gt<T>>(kinds, "setp.gt" + type);
  add_operation<ge<T>>(kinds, "setp.ge" + type);
}

template <typename Unsigned>
void add_bits(std::vector<Kind>& kinds, const std::string& width) {
  using Signed = std::make_signed_t<Unsigned>;
  add_operation<bit_and<Unsigned>>(kinds, "and.b" + width);
  add_operation<bit_or<Unsigned>>(kinds, "or.b" + width);
  add_operation<bit_xor<Unsigned>>(kinds, "xor.b" + width);
  add_operation<bit_not<Unsigned>>(kinds, "not.b" + width);
  add_operation<insert_bits<Unsigned>>(kinds, "bfi.b" + width);
  add_operation<shift_left<Unsigned>>(kinds, "shl.b" + width);
  add_operation<shift_right<Unsigned>>(kinds, "shr.u" + width);
  add_operation<shift_right<Signed>>(kinds, "shr.s" + width);
}

template <typename Unsigned>
void add_arithmetic(std::vector<Kind>& kinds, const std::string& width) {
  using Signed = std::make_signed_t<Unsigned>;
  for (const std::string& type : {".s" + width, ".u" + width}) {
    add_operation<add<Unsigned>>(kinds, "add" + type);
    add_operation<subtract<Unsigned>>(kinds, "sub" + type);
    add_operation<multiply<Unsigned>>(kinds, "mul.lo" + type);
    add_operation<multiply_add<Unsigned>>(kinds, "mad.lo" + type);
  }
  add_operation<negate<Unsigned>>(kinds, "neg.s" + width);
  add_operation<divide<Signed>>(kinds, "div.s" + width);
  add_operation<divide<Unsigned>>(kinds, "div.u" + width);
  add_operation<remainder<Signed>>(kinds, "rem.s" + width);
  add_operation<remainder<Unsigned>>(kinds, "rem.u" + width);
  add_operation<minimum<Signed>>(kinds, "min.s" + width);
  add_operation<minimum<Unsigned>>(kinds, "min.u" + width);
  add_operation<maximum<Signed>>(kinds, "max.s" + width);
  add_operation<maximum<Unsigned>>(kinds, "max.u" + width);
}

}  // namespace

void add_integers(std::vector<Kind>& kinds) {
  add_arithmetic<u32>(kinds, "32");
  add_arithmetic<u64>(kinds, "64");
  add_operation<multiply_wide<u32, u16>>(kinds, "mul.wide.u16");
  add_operation<multiply_wide<u64, u32>>(kinds, "mul.wide.u32");
  add_operation<multiply_wide<s64, s32>>(kinds, "mul.wide.s32");

  add_bits<u32>(kinds, "32");
  add_bits<u64>(kinds, "64");
  add_operation<permute>(kinds, "prmt.b32");
  add_operation<predicate_and>(kinds, "and.pred");
  add_operation<predicate_or>(kinds, "or.pred");
  add_operation<predicate_xor>(kinds, "xor.pred");
  add_operation<predicate_not>(kinds, "not.pred");

  add_comparisons<s16>(kinds, ".s16");
  add_comparisons<u16>(kinds, ".u16");
  add_comparisons<s32>(kinds, ".s32");
  add_comparisons<u32>(kinds, ".u32");
  add_comparisons<s64>(kinds, ".s64");
  add_comparisons<u64>(kinds, ".u64");
  // Bits are equal or not.
  add_operation<eq<u32>>(kinds, "setp.eq.b32");
  add_operation<ne<u32>>(kinds, "setp.ne.b32");
  add_operation<eq<u64>>(kinds, "setp.eq.b64");
  add_operation<ne<u64>>(kinds, "setp.ne.b64");
}

}  // namespace ptx
}  // namespace emulator
