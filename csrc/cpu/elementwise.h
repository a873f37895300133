// An elementwise pass over a chunk: the loops that write y, dx and dresidual.
#pragma once

#include <type_traits>

#include "iterate.h"
#include "mask.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Joins the short rows of channels [c0, c1) of one sample, which follow each other in memory from
// `at` on: the rest of a row makes one vector with the beginning of the next, and its lanes have
// the coefficients of both channels. Rows are no shorter than V.
template <typename V, typename Hint, typename Mask, typename A, int kCount, typename F>
BNORM_INLINE void for_each_vector_of_joined_rows(int64_t S, Offset at, int64_t c0, int64_t c1,
                                                 Hint hint, const A* const (&coefficients)[kCount],
                                                 Mask& mask, F f) {
  int64_t left = 0;  // of row c
  for (int64_t c = c0; c < c1; ++c) {
    V k[kCount];
    for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c]);
    for (left += S; left >= V::W; left -= V::W, at = at + V::W) {
      f(at, Full{}, hint, k, mask);
    }
    if (left == 0 || c + 1 == c1) continue;
    const auto own = from_mask(V{}, (uint64_t{1} << left) - 1);
    for (int i = 0; i < kCount; ++i) k[i] = select(own, k[i], V::all(coefficients[i][c + 1]));
    f(at, Full{}, hint, k, mask);
    at = at + V::W;
    left -= V::W;
  }
  if (left == 0) return;
  V k[kCount];
  for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c1 - 1]);
  f(at, Part{left}, Cached{}, k, mask);
}

// A store past the caches needs no line. Any other one waits for its line where that is not cached, as
// an output seldom is in a net, though it is in a loop that repeats one call. By columns, a vector has
// so many loads that the processor does not look far enough ahead: the line is asked for so many bytes
// before (bench/NOTES.md, 48). Vectors of 16 bytes would ask four times for each.
constexpr int64_t kStoredAhead = 256;
template <typename V, typename T>
BNORM_INLINE void fetch_to_store(const T* out, Full, Cached) {
  if constexpr (V::W * sizeof(T) > 16) {
    __builtin_prefetch(out + kStoredAhead / static_cast<int64_t>(sizeof(T)), /*rw=*/1);
  }
}
template <typename V, typename T, typename P, typename H>
BNORM_INLINE void fetch_to_store(const T*, P, H) {}

// Calls f(at, Full | Part, hint, k, mask) for every vector of channels [c0, c1) of a span.
//   at    the offset of its first element
//   hint  Cached | Nontemporal: how to store at out + at.element
//   k[i]  the coefficients of its lanes, from the arrays coefficients[i][c]
//   mask  Mask (MaskWriter or NoMask), which takes the vector's bits
template <typename Mask, typename T, int kCount, typename F>
BNORM_INLINE void for_each_vector_of_span(const Shape& shape, const Span& span, int64_t c0,
                                          int64_t c1, const Acc<T>* const (&coefficients)[kCount],
                                          T* out, bool nontemporal, uint8_t* mask_bytes, F f) {
  using V = VectorOf<T>;
  Mask mask(mask_bytes);
  const bool by_rows = shape.S >= max(kTinyRow, V::W);
  if (by_rows && shape.S < kJoinedVectors * V::W) {
    static_assert(kJoinedVectors * V::W <= kShortRow, "the rows of a sample are one mask row");
    const MaskRows rows(shape);
    for (int64_t n = span.n0; n < span.n1; ++n) {
      const int64_t first = (n * shape.C + c0) * shape.S;
      const Offset at{first, rows.bit(first, n, c0)};
      mask.start_row(at.bit);
      if (nontemporal && is_aligned<V>(out + first)) {
        for_each_vector_of_joined_rows<V>(shape.S, at, c0, c1, Nontemporal{}, coefficients, mask,
                                          f);
      } else {
        for_each_vector_of_joined_rows<V>(shape.S, at, c0, c1, Cached{}, coefficients, mask, f);
      }
    }
    mask.finish();
    return;
  }
  if (by_rows) {
    for_each_row(
        shape, span, c0, c1, [&](Offset first, int64_t length, int64_t c) BNORM_INLINE_LAMBDA {
          V k[kCount];
          for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c0 + c]);
          mask.start_row(first.bit);
          for_each_stored_vector<V>(out + first.element, length, nontemporal,
                                    [&](int64_t i, auto part, auto hint)
                                        BNORM_INLINE_LAMBDA { f(first + i, part, hint, k, mask); });
        });
    mask.finish();
    return;
  }
  Columns<Acc<T>> columns[kCount];
  const int64_t joined = samples_per_row(shape);
  for_each_tile(shape, span, c0, c1, joined, [&](const Tile& tile) BNORM_INLINE_LAMBDA {
    for (int i = 0; i < kCount; ++i) {
      expand_to_columns<V>(tile, shape.S, coefficients[i] + tile.c0, columns[i].a);
    }
    for (int64_t r = 0; r <= tile.rows; ++r) {
      const Offset first = tile.row(r);
      const int64_t width = r < tile.rows ? tile.width : tile.rest;
      if (width == 0) continue;
      // Nontemporal stores to a row that is not aligned begin with a part of a vector. All later
      // vectors then start between two vectors of columns, which the lane order of EvenOdd does not
      // allow: such rows are stored as usual.
      const bool needs_usual_stores =
          std::is_same<V, EvenOdd>::value && !is_aligned<V>(out + first.element);
      mask.start_row(first.bit);
      for_each_stored_vector<V>(out + first.element, width, nontemporal && !needs_usual_stores,
                                [&](int64_t j, auto part, auto hint) BNORM_INLINE_LAMBDA {
                                  fetch_to_store<V>(out + first.element + j, part, hint);
                                  V k[kCount];
                                  for (int i = 0; i < kCount; ++i) {
                                    k[i] = load_lane_order(columns[i].a + j, V{});
                                  }
                                  f(first + j, part, hint, k, mask);
                                });
    }
  });
  mask.finish();
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
