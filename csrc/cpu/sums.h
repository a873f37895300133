// Sums over a chunk, for the moments and for the backward pass.
#pragma once

#include "walk.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Two vectors, of which a and a * b are summed.
template <typename V>
struct Pair {
  V a, b;
};

// How many of them in one tree: 16 registers' worth.
template <typename V>
constexpr int kTree = 16 * Vec<typename V::Scalar>::W / V::W;

// Sums over pair(first) .. pair(first + kCount - 1), as trees: equal values are added without
// rounding, others are rounded log2(kCount) times. What comes out is added up in double.
template <int kCount, typename F>
BNORM_INLINE auto tree(int first, F pair) {
  if constexpr (kCount == 1) {
    const auto v = pair(first);
    return decltype(v){v.a, v.a * v.b};
  } else if constexpr (kCount == 2) {
    const auto v = pair(first), w = pair(first + 1);
    return decltype(v){v.a + w.a, multiply_add(v.a, v.b, w.a * w.b)};
  } else {
    const auto v = tree<kCount / 2>(first, pair), w = tree<kCount / 2>(first + kCount / 2, pair);
    return decltype(v){v.a + w.a, v.b + w.b};
  }
}

// The lanes of a channel's two sums.
template <typename V>
struct alignas(64) Lanes {
  double a[V::W] = {}, ab[V::W] = {};

  BNORM_INLINE void add(Pair<V> sums) {
    add_to(a, sums.a);
    add_to(ab, sums.b);
  }
};
BNORM_INLINE double total(const double* lanes, int64_t count) {
  Vec<double> v = load(lanes, Full{}, Vec<double>::all(0));
  for (int64_t i = Vec<double>::W; i < count; i += Vec<double>::W) {
    v = v + load(lanes + i, Full{}, v);
  }
  return sum(v);
}

// One row of a channel.
template <typename V, int kCount, typename Load>
BNORM_INLINE void add_row(Place at, int64_t length, const V (&k)[kCount], Lanes<V>& lanes,
                          Load load_pair) {
  constexpr int64_t W = V::W;
  Lanes<V> sums = lanes;  // which the compiler keeps in registers
  int64_t i = 0;
  const auto whole = [&](int u)
                         BNORM_INLINE_LAMBDA { return load_pair(at + (i + u * W), Full{}, k); };
  for (; i + kTree<V> * W <= length; i += kTree<V> * W) sums.add(tree<kTree<V>>(0, whole));
  for (; i + 4 * W <= length; i += 4 * W) sums.add(tree<4>(0, whole));
  if (i < length) {
    Pair<V> v[4] = {};
    each_vector_of_four<V>(
        length - i, [&](int64_t j, int u, auto part) { v[u] = load_pair(at + (i + j), part, k); });
    sums.add(tree<4>(0, [&](int u) { return v[u]; }));
  }
  lanes = sums;
}

// The coefficients of a tile's columns.
template <typename A, int kCount>
using Spread = const Columns<A> (&)[kCount];

// kRows rows of a tile from row `first` on, as far as `width`.
template <typename V, int kRows, int kCount, typename Load>
BNORM_INLINE void add_rows(const Tile& tile, int64_t first, int64_t width,
                           Spread<typename V::Scalar, kCount> coefficients, double* a, double* ab,
                           Load load_pair) {
  const Place at = tile.row(first);
  const int64_t stride = tile.stride, bit_stride = tile.stride + tile.padding;
  each_vector<V>(width, [&](int64_t j, auto part) BNORM_INLINE_LAMBDA {
    V k[kCount];
    for (int i = 0; i < kCount; ++i) k[i] = load_lanes(coefficients[i].a + j, V{});
    const Pair<V> sums = tree<kRows>(0, [&](int u) BNORM_INLINE_LAMBDA {
      return load_pair(Place{at.at + j + u * stride, at.bit + j + u * bit_stride}, part, k);
    });
    add_to(a + j, sums.a);
    if (ab != nullptr) add_to(ab + j, sums.b);
  });
}

// Sums down the columns of a tile, of a * b where there is a place for it.
template <typename V, int kCount, typename Load>
BNORM_INLINE void sum_columns(const Tile& tile, int64_t element_size,
                              Spread<typename V::Scalar, kCount> coefficients, double* a,
                              double* ab, Load load_pair) {
  for (int64_t j = 0; j < tile.width + V::W; ++j) a[j] = 0;
  if (ab != nullptr) {
    for (int64_t j = 0; j < tile.width + V::W; ++j) ab[j] = 0;
  }
  const auto take = [&](int64_t row, auto count) {
    add_rows<V, decltype(count)::value>(tile, row, tile.width, coefficients, a, ab, load_pair);
  };
  // Rows that are whole pages apart would share one set of the first cache.
  const bool crowded = tile.stride * element_size % 2048 == 0;
  int64_t r = 0;
  for (; r + kTree<V> <= tile.rows && !crowded; r += kTree<V>) {
    take(r, std::integral_constant<int, kTree<V>>{});
  }
  for (; r + 4 <= tile.rows; r += 4) take(r, std::integral_constant<int, 4>{});
  for (; r < tile.rows; ++r) take(r, std::integral_constant<int, 1>{});
  add_rows<V, 1>(tile, tile.rows, tile.rest, coefficients, a, ab, load_pair);
}

// Sums of a and a * b over channels [c0, c1) of a span: sum_a[c - c0], sum_ab[c - c0], where
// load_pair(place, Full | Part, k) gives a and b, and zeros beyond a Part; k[i] is the channel's
// coefficients[i][c - c0].
template <typename T, int kCount, typename Load>
BNORM_INLINE void sums_of_pairs(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                const Acc<T>* const (&coefficients)[kCount], double* sum_a,
                                double* sum_ab, Load load_pair) {
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<Acc<T>> k[kCount];
    Columns<double> a, ab;
    each_tile(shape, span, c0, c1, [&](const Tile& tile) BNORM_INLINE_LAMBDA {
      for (int i = 0; i < kCount; ++i) {
        spread<V>(tile, shape.S, coefficients[i] + (tile.c0 - c0), k[i].a);
      }
      sum_columns<V>(tile, sizeof(T), k, a.a, ab.a, load_pair);
      gather<V>(tile, shape.S, a.a, sum_a + (tile.c0 - c0));
      gather<V>(tile, shape.S, ab.a, sum_ab + (tile.c0 - c0));
    });
    return;
  }
  constexpr int64_t kRowChannels = 16;  // in the order of memory; their lanes stay in L1
  for (int64_t c = c0; c < c1; c += kRowChannels) {
    const int64_t end = smaller(c + kRowChannels, c1);
    Lanes<V> lanes[kRowChannels];
    each_row(shape, span, c, end, [&](Place place, int64_t length, int64_t j) BNORM_INLINE_LAMBDA {
      V k[kCount];
      for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c - c0 + j]);
      add_row(place, length, k, lanes[j], load_pair);
    });
    for (int64_t j = 0; j < end - c; ++j) {
      sum_a[c - c0 + j] = total(lanes[j].a, V::W);
      sum_ab[c - c0 + j] = total(lanes[j].ab, V::W);
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
