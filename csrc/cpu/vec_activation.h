// The primitives of the formulas in ../activation.h for vectors. Those of Vec that use SIMD
// instructions are in vec_*.inc; those of EvenOdd apply them to both halves.
#pragma once

#include "../activation.h"
#include "vec.h"

namespace bnorm_ext {
namespace cpu {
namespace {

template <typename A>
BNORM_INLINE Vec<A> constant(Vec<A>, double c) {
  return Vec<A>::all(static_cast<A>(c));
}

// e^a for a <= 0, to about one unit in the last place: 2^n * e^r with |r| <= ln(2) / 2. e^r is a
// polynomial (of Cephes' expf). 2^n is two factors, because it may be too small for a normal float.
BNORM_INLINE Vec<float> exponential(Vec<float> a) {
  using V = Vec<float>;
  const V shift = V::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V lowest = V::all(-104.0f);     // below it e^a is 0
  a = select(greater(lowest, a), lowest, a);
  const V n = multiply_add(a, V::all(1.44269504088896341f), shift) - shift;
  V r = multiply_add(n, V::all(-0.693359375f), a);
  r = multiply_add(n, V::all(2.12194440e-4f), r);
  V p = multiply_add(V::all(1.9875691500e-4f), r, V::all(1.3981999507e-3f));
  p = multiply_add(p, r, V::all(8.3334519073e-3f));
  p = multiply_add(p, r, V::all(4.1665795894e-2f));
  p = multiply_add(p, r, V::all(1.6666665459e-1f));
  p = multiply_add(p, r, V::all(5.0000001201e-1f));
  const V e_r = multiply_add(p, r * r, r) + V::all(1.0f);
  const V half = multiply_add(n, V::all(0.5f), shift), rest = (n - (half - shift)) + shift;
  return (e_r * power_of_two(half)) * power_of_two(rest);
}

// One value at a time: double data serves for checks, where speed does not matter.
BNORM_INLINE Vec<double> exponential(Vec<double> a) {
  double lanes[Vec<double>::W];
  store(lanes, Full{}, a);
  for (double& lane : lanes) lane = __builtin_exp(lane);
  return load(lanes, Full{}, a);
}

// ---- EvenOdd ----------------------------------------------------------------------------------

BNORM_INLINE EvenOdd constant(EvenOdd, double c) {
  return EvenOdd::all(static_cast<float>(c));
}
struct EvenOddMask {
  LaneMask<float> even, odd;
};
BNORM_INLINE EvenOddMask greater(EvenOdd a, EvenOdd b) {
  return {greater(a.even, b.even), greater(a.odd, b.odd)};
}
BNORM_INLINE EvenOddMask not_less_equal(EvenOdd a, EvenOdd b) {
  return {not_less_equal(a.even, b.even), not_less_equal(a.odd, b.odd)};
}
BNORM_INLINE EvenOddMask operator&(EvenOddMask a, EvenOddMask b) {
  return {a.even & b.even, a.odd & b.odd};
}
BNORM_INLINE EvenOdd select(EvenOddMask which, EvenOdd a, EvenOdd b) {
  return {select(which.even, a.even, b.even), select(which.odd, a.odd, b.odd)};
}
BNORM_INLINE EvenOdd smooth(Activation act, EvenOdd z) {
  return {bnorm_ext::smooth(act, z.even), bnorm_ext::smooth(act, z.odd)};
}
BNORM_INLINE EvenOdd smooth_gradient(Activation act, EvenOdd dy, EvenOdd z) {
  return {bnorm_ext::smooth_gradient(act, dy.even, z.even),
          bnorm_ext::smooth_gradient(act, dy.odd, z.odd)};
}

static_assert(EvenOdd::W <= 32, "MaskWriter::put takes at most 32 bits");
BNORM_INLINE uint64_t movemask(EvenOddMask a) {
  return movemask(a.even, a.odd);
}
BNORM_INLINE EvenOddMask from_mask(EvenOdd, uint64_t bits) {
  return {even_from_mask(bits), odd_from_mask(bits)};
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
