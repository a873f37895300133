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

// Calls f(offset, length, channel - c0) for each row of some channels in the span: its first
// element, and how many. In the order of memory, which matters where rows are short.
template <typename F>
BNORM_INLINE void each_row(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  for (int64_t n = span.n0; n < span.n1; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      f((n * shape.C + c) * shape.S + span.s0, span.s1 - span.s0, c - c0);
    }
  }
}

// Calls f(offset) for each element of channel c in the span, in either layout.
template <typename F>
BNORM_INLINE void each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  if (shape.layout == Layout::ChannelsLast) {
    for (int64_t row = span.s0; row < span.s1; ++row) f(row * shape.C + c);
  } else {
    each_row(shape, span, c, c + 1, [&](int64_t offset, int64_t length, int64_t) {
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

// Within a row, for a pass that only reads: hardware prefetch starts anew on every page and row.
template <typename T>
BNORM_INLINE void fetch_next(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096, /*rw=*/0, /*locality=*/3);
}

// ---- Sums -------------------------------------------------------------------------------------

// A lane of the accumulation type takes at most this many values before it is emptied into double.
// Equal values round the same way each time, so that n of them may cost n / 2 units in the last
// place; this many cost two, of the four that are promised.
constexpr int64_t kLaneLength = 4;

template <typename A>
struct DoubleLanes {
  Vec<double> low = Vec<double>::all(0), high = Vec<double>::all(0);
  BNORM_INLINE void add(const Vec<float> (&a)[4]) {
    low = low + ((low_half(a[0]) + low_half(a[1])) + (low_half(a[2]) + low_half(a[3])));
    high = high + ((high_half(a[0]) + high_half(a[1])) + (high_half(a[2]) + high_half(a[3])));
  }
  BNORM_INLINE void add(const Vec<double> (&a)[4]) { low = low + ((a[0] + a[1]) + (a[2] + a[3])); }
  BNORM_INLINE double total() const { return sum(low + high); }
};

// Two sums over one channel, in four chains of additions each, since one would wait for its own
// latency.
template <typename A>
class ChannelAccumulator {
 public:
  using V = Vec<A>;

  // f(offset, part, s1, s2) adds the vector at offset to s1 and s2, for one row of `length` values.
  template <typename F>
  BNORM_INLINE void row(int64_t offset, int64_t length, F f) {
    constexpr int64_t W = V::W, kBlock = 4 * W * kLaneLength;
    int64_t i = 0;
    for (; i + kBlock <= length; i += kBlock) {
      // Chains of the block's own, so that they stay in registers.
      V s1[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
      V s2[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
      for (int64_t at = offset + i; at < offset + i + kBlock; at += 4 * W) {
        f(at, Full{}, s1[0], s2[0]);
        f(at + W, Full{}, s1[1], s2[1]);
        f(at + 2 * W, Full{}, s1[2], s2[2]);
        f(at + 3 * W, Full{}, s1[3], s2[3]);
      }
      lanes1_.add(s1);
      lanes2_.add(s2);
    }
    if (i == length) return;
    const int64_t taken = (length - i + 4 * W - 1) / (4 * W);
    if (taken > room_) empty();
    room_ -= taken;
    each_vector_of_four<A>(length - i, [&](int64_t j, int u, auto part) {
      f(offset + i + j, part, rest1_[u], rest2_[u]);
    });
  }

  BNORM_INLINE double total1() { return empty(), lanes1_.total(); }
  BNORM_INLINE double total2() { return empty(), lanes2_.total(); }

 private:
  BNORM_INLINE void empty() {
    lanes1_.add(rest1_);
    lanes2_.add(rest2_);
    for (int u = 0; u < 4; ++u) rest1_[u] = rest2_[u] = V::all(0);
    room_ = kLaneLength;
  }

  DoubleLanes<A> lanes1_, lanes2_;
  // Of the ends of rows, shorter than a block.
  V rest1_[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V rest2_[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  int64_t room_ = kLaneLength;  // of the fullest of them
};

// Sums of a block of channels in ChannelsLast, over rows that are taken four at a time. A whole
// number of vectors, so that only accesses to tensors need a part.
constexpr int64_t kRowsPerBlock = 4 * kLaneLength;
template <typename A>
struct ChannelBlock {
  alignas(64) A a[kChannelBlock];
  BNORM_INLINE Vec<A> get(int64_t i) const { return load(a + i, Full{}, Vec<A>::all(0)); }
  BNORM_INLINE void set(int64_t i, Vec<A> v) { store(a + i, Full{}, v); }
  BNORM_INLINE void clear() {
    for (int64_t i = 0; i < kChannelBlock; i += Vec<A>::W) set(i, Vec<A>::all(0));
  }
  BNORM_INLINE void empty_into(double* total, int64_t width) {
    for (int64_t i = 0; i < width; ++i) total[i] += static_cast<double>(a[i]);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
