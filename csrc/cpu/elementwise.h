// An elementwise pass over a chunk.
#pragma once

#include "walk.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Rows are taken across the samples below this many positions only.
constexpr int64_t kTinyRow = 16;

// Rows of fewer vectors than this run into each other; longer ones gain nothing by it.
constexpr int64_t kFewVectors = 8;

// For passes that write no mask.
struct NoBits {
  explicit BNORM_INLINE NoBits(uint8_t*) {}
  BNORM_INLINE void start(int64_t) {}
  BNORM_INLINE void finish() {}
};

// The short rows of channels [c0, c1) of a sample one after the other, as they lie in memory from
// `place` on: what is left of a row makes one vector with the beginning of the next, whose lanes
// have coefficients of either. Rows are no shorter than V.
template <typename V, typename How, typename Bits, typename A, int kCount, typename F>
BNORM_INLINE void each_vector_of_rows(int64_t S, Place place, int64_t c0, int64_t c1, How how,
                                      const A* const (&coefficients)[kCount], Bits& bits, F f) {
  int64_t left = 0;  // of row c
  for (int64_t c = c0; c < c1; ++c) {
    V k[kCount];
    for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c]);
    for (left += S; left >= V::W; left -= V::W, place = place + V::W) {
      f(place, Full{}, how, k, bits);
    }
    if (left == 0 || c + 1 == c1) continue;
    const auto own = lanes_of(V{}, (uint64_t{1} << left) - 1);
    for (int i = 0; i < kCount; ++i) k[i] = select(own, k[i], V::all(coefficients[i][c + 1]));
    f(place, Full{}, how, k, bits);
    place = place + V::W;
    left -= V::W;
  }
  if (left == 0) return;
  V k[kCount];
  for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c1 - 1]);
  f(place, Part{left}, Cached{}, k, bits);
}

// Calls f(place, Full | Part, how, k, bits) for every vector of channels [c0, c1) of a span, where
// k[i] are the coefficients of its lanes, from the arrays coefficients[i][c], `how` is the way to
// store at out + place.at, and `bits` (NoBits or BitWriter) takes the row's bits of the mask.
template <typename Bits, typename T, int kCount, typename F>
BNORM_INLINE void each_vector_of_span(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                      const Acc<T>* const (&coefficients)[kCount], T* out,
                                      bool stream, uint8_t* mask, F f) {
  using V = VectorOf<T>;
  Bits bits(mask);
  if (shape.S >= kTinyRow && shape.S >= V::W && shape.S < kFewVectors * V::W) {
    static_assert(kFewVectors * V::W <= kShortRow, "a mask's bits lie as the elements do");
    const MaskRows rows(shape);
    for (int64_t n = span.n0; n < span.n1; ++n) {
      const int64_t first = (n * shape.C + c0) * shape.S;
      const Place place{first, rows.bit(first, n, c0)};
      bits.start(place.bit);
      if (stream && is_aligned<V>(out + first)) {
        each_vector_of_rows<V>(shape.S, place, c0, c1, Streamed{}, coefficients, bits, f);
      } else {
        each_vector_of_rows<V>(shape.S, place, c0, c1, Cached{}, coefficients, bits, f);
      }
    }
    bits.finish();
    return;
  }
  if (shape.S >= kTinyRow) {
    each_row(shape, span, c0, c1, [&](Place place, int64_t length, int64_t c) BNORM_INLINE_LAMBDA {
      V k[kCount];
      for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c0 + c]);
      bits.start(place.bit);
      each_vector_to<V>(out + place.at, length, stream,
                        [&](int64_t i, auto part, auto how)
                            BNORM_INLINE_LAMBDA { f(place + i, part, how, k, bits); });
    });
    bits.finish();
    return;
  }
  Columns<Acc<T>> columns[kCount];
  each_tile(shape, span, c0, c1, [&](const Tile& tile) BNORM_INLINE_LAMBDA {
    for (int i = 0; i < kCount; ++i) {
      spread<V>(tile, shape.S, coefficients[i] + tile.c0, columns[i].a);
    }
    for (int64_t r = 0; r <= tile.rows; ++r) {
      const Place place = tile.row(r);
      const int64_t width = r < tile.rows ? tile.width : tile.rest;
      if (width == 0) continue;
      // Columns by even and odd places can be had from whole vectors on only.
      const bool whole = std::is_same<V, EvenOdd>::value && !is_aligned<V>(out + place.at);
      bits.start(place.bit);
      each_vector_to<V>(out + place.at, width, stream && !whole,
                        [&](int64_t j, auto part, auto how) BNORM_INLINE_LAMBDA {
                          V k[kCount];
                          for (int i = 0; i < kCount; ++i) k[i] = load_lanes(columns[i].a + j, V{});
                          f(place + j, part, how, k, bits);
                        });
    }
  });
  bits.finish();
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
