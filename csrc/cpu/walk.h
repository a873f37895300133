// The way through a chunk, which the sums (sums.h) and the elementwise passes (elementwise.h)
// share.
//
// Vectors run along the memory. Where rows are long (S of kShortRow and more, or few samples) one
// vector lies within a channel: coefficients are broadcast, and lanes are added at the end of a
// row. Where they are short the chunk is a matrix of samples whose columns are the C * S elements
// of each: coefficients are spread out over the columns, sums are taken down the columns and folded
// into channels at the end. Channels-last data is the case S = 1.
//
// Compiled once per instruction set; everything is in an unnamed namespace (see vec.h).
#pragma once

#include <type_traits>

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
  return sum(load(p, Part{1}, VectorOf<T>::all(0)));
}

// Calls f(place, length, channel - c0) for each row of some channels in the span: its first
// element, and how many. In the order of memory.
template <typename F>
BNORM_INLINE void each_row(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  const MaskRows mask(shape);
  for (int64_t n = span.n0; n < span.n1; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t at = (n * shape.C + c) * shape.S + span.s0;
      f(Place{at, mask.bit(at, n, c)}, span.s1 - span.s0, c - c0);
    }
  }
}

// Calls f(place) for each element of channel c in the span.
template <typename F>
BNORM_INLINE void each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  each_row(shape, span, c, c + 1, [&](Place place, int64_t length, int64_t) {
    for (int64_t i = 0; i < length; ++i) f(place + i);
  });
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

// ---- Columns ----------------------------------------------------------------------------------

// Whole vectors of the columns of some channels, with room for a vector that is not whole.
template <typename A>
struct alignas(64) Columns {
  A a[kColumns + 64];
};

// A matrix of `rows` rows, `width` columns, the first element at `at`, and of a last row of `rest`
// columns only; in a mask rows are `padding` bits further apart. Column j belongs to channel c0 + j
// / S % (c1 - c0).
struct Tile {
  int64_t c0, c1;
  Place at;
  int64_t stride, padding, rows, width, rest;

  Place row(int64_t r) const { return {at.at + r * stride, at.bit + r * (stride + padding)}; }
  int64_t copies(int64_t S) const { return width / ((c1 - c0) * S); }
};

// Calls f(tile) for tiles that cover channels [c0, c1) of the span. Where a sample is shorter than
// a few vectors, some in a row make one row of the tile; then all channels have to be asked for.
template <typename F>
BNORM_INLINE void each_tile(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  const int64_t S = shape.S, sample = shape.C * S, samples = span.n1 - span.n0;
  const int64_t k = is_folded(shape) ? fold(sample) : 1;
  const MaskRows mask(shape);
  const int64_t step = is_folded(shape) ? shape.C : tile_channels(S);
  for (int64_t c = c0; c < c1; c += step) {
    const int64_t end = smaller(c + step, c1), width = (end - c) * S;
    const int64_t at = span.n0 * sample + c * S;
    f(Tile{c, end, Place{at, mask.bit(at, span.n0, c)}, k * sample, mask.padding(), samples / k,
           k * width, samples % k * width});
  }
}

// of_channel[c] (c from c0) into every column of it, and zeros into the room behind; by lanes of V.
template <typename V, typename A>
BNORM_INLINE void spread(const Tile& tile, int64_t S, const A* of_channel, A* columns) {
  const int64_t channels = tile.c1 - tile.c0;
  int64_t j = 0;
  for (int64_t copy = 0; copy < tile.copies(S); ++copy) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < S; ++s) columns[j++] = of_channel[c];
    }
  }
  for (const int64_t end = j + V::W; j < end; ++j) columns[j] = 0;
  to_lanes(V{}, columns, tile.width);
}

// out[c] (c from c0): the sum of the columns of it, which are by lanes of V, then by place.
template <typename V>
BNORM_INLINE void gather(const Tile& tile, int64_t S, double* columns, double* out) {
  using D = Vec<double>;
  to_places(V{}, columns, tile.width);
  const int64_t channels = tile.c1 - tile.c0;
  for (int64_t c = 0; c < channels; ++c) out[c] = 0;
  for (int64_t copy = 0; copy < tile.copies(S); ++copy) {
    if (S == 1) {
      for (int64_t c = 0; c < channels; ++c) out[c] += columns[c];
      columns += channels;
      continue;
    }
    for (int64_t c = 0; c < channels; ++c, columns += S) {
      if (S < 2 * D::W) {
        for (int64_t s = 0; s < S; ++s) out[c] += columns[s];
      } else {
        D s4[4] = {D::all(0), D::all(0), D::all(0), D::all(0)};
        each_vector_of_four<D>(S, [&](int64_t s, int u, auto part) {
          s4[u] = s4[u] + load(columns + s, part, D::all(0));
        });
        out[c] += sum((s4[0] + s4[1]) + (s4[2] + s4[3]));
      }
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
