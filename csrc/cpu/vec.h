// Vectors of the accumulation type, with loads and stores that convert from and to the data's type.
// SIMD instructions are in vec_*.inc only, one file for each instruction set.
//
//   Vec<float>   16 lanes with AVX-512, 8 with AVX2, 4 otherwise
//   Vec<double>   8 lanes with AVX-512, 4 with AVX2, 2 otherwise
//   EvenOdd      two Vec<float>, with the even and the odd elements of W bfloat16, which shifts and
//                masks convert without moves between lanes
//   VectorOf<T>  the type that elements of type T are loaded as
//   load(pointer, Full, fill)    W elements of float, double, half or bfloat16
//   load(pointer, Part, fill)    the first n < W of them, the other lanes from fill
//   store(pointer, Full | Part, vector)
//   store(pointer, Full | Part, vector, Cached | Nontemporal)
//
// Everything here is in an unnamed namespace and always inlined. If a file compiled for AVX-512
// emitted an inline function with external linkage, the linker could keep that copy for all files,
// which would crash on older CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

#if defined(__AVX2__) || defined(__AVX512F__)
// GCC's header initialises "undefined" vectors with themselves, and GCC warns about it. Clang does
// not know these warnings.
#ifdef __clang__
#include <immintrin.h>
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BNORM_INLINE inline __attribute__((always_inline))
// Stands behind the parameters of a lambda that a loop calls: a real call would spill every vector.
#define BNORM_INLINE_LAMBDA __attribute__((always_inline))

namespace bnorm_ext {
namespace cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// How much of a vector is loaded or stored: all of it, or the first n lanes.
struct Full {};
struct Part {
  int64_t n;
};

// How to store: as usual, or past the caches. Nontemporal stores take whole vectors to aligned
// addresses; fence() makes them visible to other threads.
struct Cached {};
struct Nontemporal {};

template <typename A>
struct Vec;

struct EvenOdd;

#if defined(__AVX512F__)
#include "vec_avx512.inc"
#elif defined(__AVX2__)
#include "vec_avx2.inc"
#else
#include "vec_generic.inc"
#endif

BNORM_INLINE double sum(Vec<float> a) {
  return sum(low_half(a) + high_half(a));
}

struct EvenOdd {
  using Scalar = float;
  static constexpr int64_t W = 2 * Vec<float>::W;
  Vec<float> even, odd;
  static BNORM_INLINE EvenOdd all(float a) { return {Vec<float>::all(a), Vec<float>::all(a)}; }
};
BNORM_INLINE EvenOdd operator+(EvenOdd a, EvenOdd b) {
  return {a.even + b.even, a.odd + b.odd};
}
BNORM_INLINE EvenOdd operator-(EvenOdd a, EvenOdd b) {
  return {a.even - b.even, a.odd - b.odd};
}
BNORM_INLINE EvenOdd operator*(EvenOdd a, EvenOdd b) {
  return {a.even * b.even, a.odd * b.odd};
}
BNORM_INLINE EvenOdd fma(EvenOdd a, EvenOdd b, EvenOdd c) {
  return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)};
}
BNORM_INLINE EvenOdd multiply_add(EvenOdd a, EvenOdd b, EvenOdd c) {
  return {multiply_add(a.even, b.even, c.even), multiply_add(a.odd, b.odd, c.odd)};
}
BNORM_INLINE double sum(EvenOdd a) {
  return sum(a.even) + sum(a.odd);
}

// W bfloat16 are loaded as 32-bit words. Element 2 i is the lower half of word i, element 2 i + 1
// the upper half.
BNORM_INLINE EvenOdd widen(Words two) {
  return {as_floats(shift_left16(two)), as_floats(upper16(two))};
}
BNORM_INLINE Words narrow(EvenOdd a) {
  return shift_right16(rounded(a.even)) | upper16(rounded(a.odd));
}
BNORM_INLINE EvenOdd load(const BFloat16* p, Full, EvenOdd) {
  return widen(load_words(p));
}
BNORM_INLINE EvenOdd load(const BFloat16* p, Part n, EvenOdd fill) {
  const EvenOdd a = widen(load_words(p, n));
  return {blend(Part{(n.n + 1) / 2}, a.even, fill.even), blend(Part{n.n / 2}, a.odd, fill.odd)};
}
template <typename N>
BNORM_INLINE void store(BFloat16* p, N n, EvenOdd a) {
  store_words(p, n, narrow(a));
}
BNORM_INLINE void store(BFloat16* p, Full, EvenOdd a, Nontemporal) {
  store_words_nontemporal(p, narrow(a));
}

template <typename T>
struct VectorFor {
  using type = Vec<Acc<T>>;
};
template <>
struct VectorFor<BFloat16> {
  using type = EvenOdd;
};
template <typename T>
using VectorOf = typename VectorFor<T>::type;

// Arrays with one value per element come in two orders: memory order, and lane order, in which each
// W values have the order of a vector's lanes. They differ for EvenOdd only, where all even
// elements of a vector come first. These convert `count` values in place.
template <typename A>
BNORM_INLINE void to_lane_order(Vec<A>, A*, int64_t) {}
template <typename A>
BNORM_INLINE void to_memory_order(Vec<A>, double*, int64_t) {}
BNORM_INLINE void to_lane_order(EvenOdd, float* values, int64_t count) {
  constexpr int64_t H = Vec<float>::W;
  for (float* v = values; v < values + count; v += 2 * H) {
    float lanes[2 * H];
    for (int64_t i = 0; i < H; ++i) lanes[i] = v[2 * i], lanes[H + i] = v[2 * i + 1];
    for (int64_t i = 0; i < 2 * H; ++i) v[i] = lanes[i];
  }
}
BNORM_INLINE void to_memory_order(EvenOdd, double* values, int64_t count) {
  constexpr int64_t H = Vec<float>::W;
  for (double* v = values; v < values + count; v += 2 * H) {
    double elements[2 * H];
    for (int64_t i = 0; i < H; ++i) elements[2 * i] = v[i], elements[2 * i + 1] = v[H + i];
    for (int64_t i = 0; i < 2 * H; ++i) v[i] = elements[i];
  }
}

// Loads a vector from an array of coefficients in lane order.
template <typename A>
BNORM_INLINE Vec<A> load_lane_order(const A* p, Vec<A> v) {
  return load(p, Full{}, v);
}
BNORM_INLINE EvenOdd load_lane_order(const float* p, EvenOdd v) {
  return {load(p, Full{}, v.even), load(p + Vec<float>::W, Full{}, v.odd)};
}

// Adds a vector to an array of sums in lane order.
BNORM_INLINE void add_to(double* p, Vec<double> a) {
  store(p, Full{}, load(p, Full{}, a) + a);
}
BNORM_INLINE void add_to(double* p, Vec<float> a) {
  add_to(p, low_half(a));
  add_to(p + Vec<double>::W, high_half(a));
}
BNORM_INLINE void add_to(double* p, EvenOdd a) {
  add_to(p, a.even);
  add_to(p + Vec<float>::W, a.odd);
}

// Calls f(i, Full) for every whole vector of [0, length), and f(i, Part) for the rest.
template <typename V, typename F>
BNORM_INLINE void for_each_vector(int64_t length, F f) {
  constexpr int64_t W = V::W;
  int64_t i = 0;
  for (; i + W <= length; i += W) f(i, Full{});
  if (i < length) f(i, Part{length - i});
}

// The same for sums: f(i, u, part) adds to accumulator u of four. Additions to a single one would
// each wait for the one before.
template <typename V, typename F>
BNORM_INLINE void for_each_vector_by_four(int64_t length, F f) {
  constexpr int64_t W = V::W;
  int64_t i = 0;
  for (; i + 4 * W <= length; i += 4 * W) {
    f(i, 0, Full{});
    f(i + W, 1, Full{});
    f(i + 2 * W, 2, Full{});
    f(i + 3 * W, 3, Full{});
  }
  if (i + W <= length) f(i, 0, Full{}), i += W;
  if (i + W <= length) f(i, 1, Full{}), i += W;
  if (i + W <= length) f(i, 2, Full{}), i += W;
  if (i < length) f(i, 3, Part{length - i});
}

// Whether out is aligned for nontemporal stores of V.
template <typename V, typename T>
BNORM_INLINE bool is_aligned(const T* out) {
  return reinterpret_cast<uintptr_t>(out) % (V::W * sizeof(T)) == 0;
}

// for_each_vector for writing to `out`: f(i, part, hint), where hint is Nontemporal for whole aligned
// vectors if `nontemporal`. The ends of the row are Cached.
template <typename V, typename T, typename F>
BNORM_INLINE void for_each_stored_vector(T* out, int64_t length, bool nontemporal, F f) {
  constexpr int64_t W = V::W;
  if (!nontemporal) {
    for_each_vector<V>(length, [&](int64_t i, auto part) { f(i, part, Cached{}); });
    return;
  }
  constexpr int64_t alignment = W * static_cast<int64_t>(sizeof(T));
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % alignment);
  int64_t i = misaligned == 0 ? 0 : (alignment - misaligned) / static_cast<int64_t>(sizeof(T));
  if (i > length) i = length;
  if (i > 0) f(0, Part{i}, Cached{});
  for (; i + W <= length; i += W) f(i, Full{}, Nontemporal{});
  if (i < length) f(i, Part{length - i}, Cached{});
}

template <typename T, typename P, typename A>
BNORM_INLINE void store(T* p, P part, A a, Cached) {
  store(p, part, a);
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
