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

template <typename A>
struct Vec;

#if defined(__AVX512F__)
#include "vec_avx512.inc"
#elif defined(__AVX2__)
#include "vec_avx2.inc"
#else
#include "vec_generic.inc"
#endif

// Calls f(i, Full) for every whole vector of [0, length), and f(i, Part) for what is left.
template <typename A, typename F>
BNORM_INLINE void each_vector(int64_t length, F f) {
  constexpr int64_t W = Vec<A>::W;
  int64_t i = 0;
  for (; i + W <= length; i += W) f(i, Full{});
  if (i < length) f(i, Part{length - i});
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
