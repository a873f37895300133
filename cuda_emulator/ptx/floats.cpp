// Floating-point arithmetic. The host's is IEEE's, as the GPU's; this file is compiled without
// contraction of products and sums.
#include <algorithm>
#include <cfenv>
#include <cmath>

#include "emulator/ptx.h"
#include "values.h"

namespace emulator {
namespace ptx {
namespace {

int approximation_error = 0;  // units in the last place

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
T divide(T a, T b) {
  return a / b;
}
template <typename T>
T reciprocal(T a) {
  return T{1} / a;
}
template <typename T>
T root(T a) {
  return std::sqrt(a);
}
template <typename T>
T fused(T a, T b, T c) {
  return std::fma(a, b, c);
}
u32 negate(u32 a) {
  return a ^ 0x80000000u;
}
u32 absolute(u32 a) {
  return a & 0x7fffffffu;
}
u64 negate_double(u64 a) {
  return a ^ u64{1} << 63;
}
u64 absolute_double(u64 a) {
  return a & ~(u64{1} << 63);
}

// Of the ordered comparisons each is false if one operand is a NaN, of the unordered ones, which end
// in u, each is true.
template <typename T>
bool unordered(T a, T b) {
  return a != a || b != b;
}
template <typename T>
bool ne(T a, T b) {
  return a < b || a > b;
}
template <typename T, bool (*ordered)(T, T)>
bool or_unordered(T a, T b) {
  return unordered(a, b) || ordered(a, b);
}

template <typename T>
void add_comparisons(std::vector<Kind>& kinds, const std::string& type) {
  add_operation<eq<T>>(kinds, "setp.eq" + type);
  add_operation<ne<T>>(kinds, "setp.ne" + type);
  add_operation<lt<T>>(kinds, "setp.lt" + type);
  add_operation<le<T>>(kinds, "setp.le" + type);
  add_operation<gt<T>>(kinds, "setp.gt" + type);
  add_operation<ge<T>>(kinds, "setp.ge" + type);
  add_operation<or_unordered<T, eq<T>>>(kinds, "setp.equ" + type);
  add_operation<or_unordered<T, ne<T>>>(kinds, "setp.neu" + type);
  add_operation<or_unordered<T, lt<T>>>(kinds, "setp.ltu" + type);
  add_operation<or_unordered<T, le<T>>>(kinds, "setp.leu" + type);
  add_operation<or_unordered<T, gt<T>>>(kinds, "setp.gtu" + type);
  add_operation<or_unordered<T, ge<T>>>(kinds, "setp.geu" + type);
}

template <typename T>
void add_arithmetic(std::vector<Kind>& kinds, const std::string& type) {
  add_operation<add<T>>(kinds, "add.rn" + type);
  add_operation<subtract<T>>(kinds, "sub.rn" + type);
  add_operation<multiply<T>>(kinds, "mul.rn" + type);
  add_operation<divide<T>>(kinds, "div.rn" + type);
  add_operation<reciprocal<T>>(kinds, "rcp.rn" + type);
  add_operation<root<T>>(kinds, "sqrt.rn" + type);
  add_operation<fused<T>>(kinds, "fma.rn" + type);
}

// To [0, 1]; a NaN becomes 0.
float saturate(float a) {
  if (!(a > 0)) return 0;
  return a > 1 ? 1.0f : a;
}
template <typename To, typename From>
To convert(From a) {
  return static_cast<To>(a);
}

float half_to_float(u16 bits) {
  // The exponents' ranges differ by 112. As a float, the other bits are 2^-112 times the number.
  const u32 sign = static_cast<u32>(bits & 0x8000) << 16;
  const u32 magnitude = static_cast<u32>(bits & 0x7fff) << 13;
  if ((bits & 0x7c00) == 0x7c00) return same_bits<float>(sign | 0x7f800000u | magnitude);
  const float value = same_bits<float>(magnitude) * 0x1p112f;
  return same_bits<float>(sign | same_bits<u32>(value));
}

// To nearest, ties to even; so is the next but one.
u16 float_to_half(float value) {
  if (value != value) return 0x7fff;
  const u32 bits = same_bits<u32>(value);
  const u16 sign = static_cast<u16>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520) return sign | 0x7c00;  // from here on, infinity is nearest
  if (magnitude < 0x1p-14f) {
    // The sum's last place is the spacing of half's denormals, 2^-24.
    return static_cast<u16>(sign | (same_bits<u32>(magnitude + 0.5f) - same_bits<u32>(0.5f)));
  }
  const u32 rebased = (bits & 0x7fffffffu) - (112u << 23);
  return static_cast<u16>(sign | ((rebased + 0xfff + (rebased >> 13 & 1)) >> 13));
}

float bfloat16_to_float(u16 bits) {
  return same_bits<float>(static_cast<u32>(bits) << 16);
}

u16 float_to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  const u32 bits = same_bits<u32>(value);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The first operand becomes the upper half.
template <u16 (*rounded)(float)>
u32 float_to_pair(float upper, float lower) {
  return u32{rounded(upper)} << 16 | u32{rounded(lower)};
}

// a * b + c, rounded once, towards negative infinity. Volatile, so that the compiler moves nothing across the changes of the rounding.
float fma_down(float a, float b, float c) {
  const volatile float x = a, y = b, z = c;
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  const volatile float result = std::fma(x, y, z);
  std::fesetround(before);
  return result;
}

// Without denormals, and moved by the error that was chosen, or by `most` units; but for results that
// PTX promises, of zeros and infinities, and those beside the ends of the range.
float approximate(float result, int most) {
  const float size = std::fabs(result);
  if (size < 0x1p-126f) return std::copysign(0.0f, result);
  if (!(size > 0x1p-120f && size < 0x1p120f)) return result;
  const int error = std::clamp(approximation_error, -most, most);
  return same_bits<float>(same_bits<u32>(result) + static_cast<u32>(error));
}
float flushed(float a) {
  return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a;
}
float exp2_approximate(float a) {
  if (flushed(a) == 0) return 1;
  return approximate(static_cast<float>(std::exp2(static_cast<double>(a))), 2);
}
float reciprocal_approximate(float a) {
  return approximate(1 / flushed(a), 1);
}

}  // namespace

void add_floats(std::vector<Kind>& kinds) {
  add_arithmetic<float>(kinds, ".f32");
  add_arithmetic<double>(kinds, ".f64");
  add_comparisons<float>(kinds, ".f32");
  add_comparisons<double>(kinds, ".f64");
  // The sign of a NaN too.
  add_operation<negate>(kinds, "neg.f32");
  add_operation<absolute>(kinds, "abs.f32");
  add_operation<negate_double>(kinds, "neg.f64");
  add_operation<absolute_double>(kinds, "abs.f64");
  add_operation<fma_down>(kinds, "fma.rm.f32");
  add_operation<exp2_approximate>(kinds, "ex2.approx.ftz.f32");
  add_operation<reciprocal_approximate>(kinds, "rcp.approx.ftz.f32");

  add_operation<saturate>(kinds, "cvt.sat.f32.f32");
  add_operation<convert<double, float>>(kinds, "cvt.f64.f32");
  add_operation<convert<float, double>>(kinds, "cvt.rn.f32.f64");
  add_operation<convert<float, s32>>(kinds, "cvt.rn.f32.s32");
  add_operation<convert<float, u32>>(kinds, "cvt.rn.f32.u32");
  add_operation<convert<double, s32>>(kinds, "cvt.rn.f64.s32");
  add_operation<convert<double, s64>>(kinds, "cvt.rn.f64.s64");
  add_operation<half_to_float>(kinds, "cvt.f32.f16");
  add_operation<float_to_half>(kinds, "cvt.rn.f16.f32");
  add_operation<bfloat16_to_float>(kinds, "cvt.f32.bf16");
  add_operation<float_to_bfloat16>(kinds, "cvt.rn.bf16.f32");
  add_operation<float_to_pair<float_to_half>>(kinds, "cvt.rn.f16x2.f32");
  add_operation<float_to_pair<float_to_bfloat16>>(kinds, "cvt.rn.bf16x2.f32");
}

}  // namespace ptx

void set_approximation_error(int units) {
  ptx::approximation_error = units;
}

}  // namespace emulator
