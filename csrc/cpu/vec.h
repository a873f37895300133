// The one place with SIMD in it: a vector of accumulators, and loads and stores that convert.
//
//   Vec<float>   16 lanes with AVX-512, 8 with AVX2, 4 otherwise
//   Vec<double>   8 lanes with AVX-512, 4 with AVX2, 2 otherwise
//   load(pointer, Full, fill)    W elements of float, double, half or bfloat16
//   load(pointer, Part, fill)    the first n < W of them, the other lanes from fill
//   store(pointer, Full | Part, vector)
//
// Everything here is in an unnamed namespace and always inlined. A file compiled for AVX-512 that
// emitted a shared inline function would hand the linker a copy which crashes older CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
// GCC's own header initialises "undefined" vectors with themselves and then warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BNORM_INLINE inline __attribute__((always_inline))

namespace bnorm_ext {
namespace cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// How much of a vector takes part: all of it, or the first n lanes.
struct Full {};
struct Part {
  int64_t n;
};

// How to store: through the caches, or past them.
struct Cached {};
struct Streamed {};

template <typename A>
struct Vec;

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

// Calls f(i, Full) for every whole vector of [0, length), and f(i, Part) for what is left.
template <typename A, typename F>
BNORM_INLINE void each_vector(int64_t length, F f) {
  constexpr int64_t W = Vec<A>::W;
  int64_t i = 0;
  for (; i + W <= length; i += W) f(i, Full{});
  if (i < length) f(i, Part{length - i});
}

// The same for sums: f(i, u, part) adds to accumulator u of four, since one alone would wait for
// its own latency.
template <typename A, typename F>
BNORM_INLINE void each_vector_of_four(int64_t length, F f) {
  constexpr int64_t W = Vec<A>::W;
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

// The same for writing to `out`: f(i, part, how) where `how` is the way to store there. Streaming
// passes by the caches, whole aligned lines only: the ends of the row are written as usual.
template <typename A, typename T, typename F>
BNORM_INLINE void each_vector_to(T* out, int64_t length, bool stream, F f) {
  constexpr int64_t W = Vec<A>::W;
  if (!stream) {
    each_vector<A>(length, [&](int64_t i, auto part) { f(i, part, Cached{}); });
    return;
  }
  constexpr int64_t alignment = W * static_cast<int64_t>(sizeof(T));
  const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % alignment);
  int64_t i = beyond == 0 ? 0 : (alignment - beyond) / static_cast<int64_t>(sizeof(T));
  if (i > length) i = length;
  if (i > 0) f(0, Part{i}, Cached{});
  for (; i + W <= length; i += W) f(i, Full{}, Streamed{});
  if (i < length) f(i, Part{length - i}, Cached{});
}

template <typename T, typename P, typename A>
BNORM_INLINE void store(T* p, P part, A a, Cached) {
  store(p, part, a);
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
