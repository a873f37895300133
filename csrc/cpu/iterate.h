// The loops through one chunk, shared by the sums (sums.h) and the elementwise passes
// (elementwise.h).
//
// Vectors run along the memory, in one of two ways:
//   by rows     A vector lies within one channel: coefficients are broadcast, and sums add up the
//               lanes at the end of a row.
//   by columns  For short rows. The chunk is a matrix with a row for each sample and a column for
//               each of its C * S elements (Tile in plan.h). Coefficients are expanded to one per
//               column; sums go down the columns, which are then added up by channel.
//               Channels-last data is the case S = 1.
//
// Compiled once per instruction set; everything is in an unnamed namespace (see vec.h).
#pragma once

#include "plan.h"
#include "vec.h"

namespace bnorm_ext {
namespace cpu {
namespace {

BNORM_INLINE bool is_finite(double a) {
  return a - a == 0.0;
}

template <typename T>
BNORM_INLINE double value(const T* p) {
  return sum(load(p, Part{1}, VectorOf<T>::all(0)));
}

// Calls f(first, length, channel - c0) for each row of channels [c0, c1) in the span, in memory
// order. first: the offset of its first element; length: how many.
template <typename F>
BNORM_INLINE void for_each_row(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  const MaskRows mask(shape);
  for (int64_t n = span.n0; n < span.n1; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t first = (n * shape.C + c) * shape.S + span.s0;
      f(Offset{first, mask.bit(first, n, c)}, span.s1 - span.s0, c - c0);
    }
  }
}

// Calls f(at) for each element of channel c in the span.
template <typename F>
BNORM_INLINE void for_each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  for_each_row(shape, span, c, c + 1, [&](Offset first, int64_t length, int64_t) {
    for (int64_t i = 0; i < length; ++i) f(first + i);
  });
}

inline void fence_stores() {
  fence();
}

// Prefetches into L2 where stores are nontemporal: reads then overlap with the writes.
template <typename T>
BNORM_INLINE void prefetch(const T* p, Nontemporal) {
  __builtin_prefetch(p, /*rw=*/0, /*locality=*/2);
}
template <typename T>
BNORM_INLINE void prefetch(const T*, Cached) {}

// Prefetches what will be read soon.
template <typename T>
BNORM_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p);
}

// ---- Columns ----------------------------------------------------------------------------------

// One value for each column of a tile, rounded up to whole vectors.
template <typename A>
struct alignas(64) Columns {
  A a[kColumns + 64];
};

// Calls f(tile) for tiles with k samples in a row that cover channels [c0, c1) of the span: all
// channels where k exceeds 1.
template <typename F>
BNORM_INLINE void for_each_tile(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                int64_t k, F f) {
  const int64_t S = shape.S, sample = shape.C * S, samples = span.n1 - span.n0;
  const MaskRows mask(shape);
  const int64_t step = channels_per_tile(shape);
  for (int64_t c = c0; c < c1; c += step) {
    const int64_t end = min(c + step, c1), width = (end - c) * S;
    const int64_t first = span.n0 * sample + c * S;
    f(Tile{c, end, Offset{first, mask.bit(first, span.n0, c)}, k * sample, mask.padding(),
           samples / k, k * width, samples % k * width});
  }
}

// Writes of_channel[c - tile.c0] to every column of channel c, and zeros behind the last column.
// The columns end up in the lane order of V (vec.h).
template <typename V, typename A>
BNORM_INLINE void expand_to_columns(const Tile& tile, int64_t S, const A* of_channel, A* columns) {
  const int64_t channels = tile.c1 - tile.c0;
  int64_t j = 0;
  for (int64_t sample = 0; sample < tile.samples_per_row(S); ++sample) {
    if (S == 1) {  // a loop that the compiler turns into vectors
      for (int64_t c = 0; c < channels; ++c) columns[j + c] = of_channel[c];
      j += channels;
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < S; ++s) columns[j++] = of_channel[c];
    }
  }
  for (const int64_t end = j + V::W; j < end; ++j) columns[j] = 0;
  to_lane_order(V{}, columns, tile.width);
}

// out[c - tile.c0]: the sum of the columns of channel c. The columns are in the lane order of V,
// and in memory order afterwards.
template <typename V>
BNORM_INLINE void sum_by_channel(const Tile& tile, int64_t S, double* columns, double* out) {
  using D = Vec<double>;
  to_memory_order(V{}, columns, tile.width);
  const int64_t channels = tile.c1 - tile.c0;
  // Pairwise, so that few roundings add up: first the samples of a row ...
  for (int64_t samples = tile.samples_per_row(S); samples > 1;) {
    const int64_t kept = ceil_div(samples, 2), added = samples - kept;
    for (int64_t j = 0; j < added * channels * S; ++j)
      columns[j] += columns[j + kept * channels * S];
    samples = kept;
  }
  if (S == 1) {  // a loop that the compiler turns into vectors
    for (int64_t c = 0; c < channels; ++c) out[c] = columns[c];
    return;
  }
  // ... then the positions of a channel.
  for (int64_t c = 0; c < channels; ++c, columns += S) {
    if (S < 2 * D::W) {
      double s4[4] = {0, 0, 0, 0};
      for (int64_t s = 0; s < S; ++s) s4[s % 4] += columns[s];
      out[c] = (s4[0] + s4[1]) + (s4[2] + s4[3]);
    } else {
      D s4[4] = {D::all(0), D::all(0), D::all(0), D::all(0)};
      for_each_vector_by_four<D>(S, [&](int64_t s, int u, auto part) {
        s4[u] = s4[u] + load(columns + s, part, D::all(0));
      });
      out[c] = sum((s4[0] + s4[1]) + (s4[2] + s4[3]));
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
