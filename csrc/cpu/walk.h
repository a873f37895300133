// What the forward and the backward kernels share: the accumulation type, the walk over a chunk,
// and accumulators.
//
// Compiled once per instruction set; everything is in an unnamed namespace (see vec.h).
#pragma once

#include "kernels.h"
#include "vec.h"

namespace bnorm_ext {
namespace cpu {
namespace {

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

BNORM_INLINE bool finite(double a) {
  return a - a == 0.0;
}
BNORM_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename T>
BNORM_INLINE double value(const T* p) {
  return sum(load(p, Part{1}, Vec<Acc<T>>::all(0)));
}

// Calls f(offset) for the first element of each row of one channel in the span, and the number of
// elements from there on.
template <typename F>
BNORM_INLINE void each_row(const Shape& shape, const Span& span, int64_t c, F f) {
  for (int64_t n = span.n0; n < span.n1; ++n) {
    f((n * shape.C + c) * shape.S + span.s0, span.s1 - span.s0);
  }
}

// Calls f(offset) for each element of channel c in the span, in either layout.
template <typename F>
BNORM_INLINE void each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  if (shape.layout == Layout::ChannelsLast) {
    for (int64_t row = span.s0; row < span.s1; ++row) f(row * shape.C + c);
  } else {
    each_row(shape, span, c, [&](int64_t offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i) f(offset + i);
    });
  }
}

inline void fence_stores() {
  fence();
}

// Fetches into L2 what is read next while streaming stores keep the memory busy the other way.
template <typename T>
BNORM_INLINE void fetch_ahead(const T* p, Streamed) {
  __builtin_prefetch(p, /*rw=*/0, /*locality=*/2);
}
template <typename T>
BNORM_INLINE void fetch_ahead(const T*, Cached) {}

template <typename V>
struct FourSums {
  V v[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  BNORM_INLINE double total() const { return sum((v[0] + v[1]) + (v[2] + v[3])); }
};

// Per-channel accumulators of one block of channels; a whole number of vectors, so that only
// accesses to tensors need a part.
template <typename A>
struct Block {
  alignas(64) A a[kChannelBlock];
  BNORM_INLINE Vec<A> get(int64_t i) const { return load(a + i, Full{}, Vec<A>::all(0)); }
  BNORM_INLINE void set(int64_t i, Vec<A> v) { store(a + i, Full{}, v); }
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
