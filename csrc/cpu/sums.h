// Sums over a chunk, for the moments and for the backward pass.
#pragma once

#include <type_traits>

#include "iterate.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Two vectors, of which a and a * b are summed.
template <typename V>
struct Pair {
  V a, b;
};

// Vectors per tree: as many as 16 registers hold.
template <typename V>
constexpr int kTree = 16 * Vec<typename V::Scalar>::W / V::W;

// The sums of a and of a * b over pair(first) .. pair(first + kCount - 1), pairwise as a tree. Each
// value is rounded log2(kCount) times, and sums of equal values are exact. The results are then
// accumulated in double.
template <int kCount, typename F>
BNORM_INLINE auto tree_sums(int first, F pair) {
  if constexpr (kCount == 1) {
    const auto v = pair(first);
    return decltype(v){v.a, v.a * v.b};
  } else if constexpr (kCount == 2) {
    const auto v = pair(first), w = pair(first + 1);
    return decltype(v){v.a + w.a, multiply_add(v.a, v.b, w.a * w.b)};
  } else {
    const auto v = tree_sums<kCount / 2>(first, pair),
               w = tree_sums<kCount / 2>(first + kCount / 2, pair);
    return decltype(v){v.a + w.a, v.b + w.b};
  }
}

BNORM_INLINE double total(const double* lanes, int64_t count) {
  Vec<double> v = load(lanes, Full{}, Vec<double>::all(0));
  for (int64_t i = Vec<double>::W; i < count; i += Vec<double>::W) {
    v = v + load(lanes + i, Full{}, v);
  }
  return sum(v);
}

// The two sums of a channel, by lanes.
template <typename V>
struct alignas(64) LaneSums {
  double a[V::W] = {}, ab[V::W] = {};

  BNORM_INLINE void add(Pair<V> sums) {
    add_to(a, sums.a);
    add_to(ab, sums.b);
  }
  BNORM_INLINE double total_a() const { return total(a, V::W); }
  BNORM_INLINE double total_ab() const { return total(ab, V::W); }
};

// For double data there is no wider type to accumulate in. What each addition rounds away is summed
// too (Knuth's TwoSum): with two lanes, hundreds of roundings of one sign would add up. Where a sum
// is infinite the total is NaN.
template <>
struct alignas(64) LaneSums<Vec<double>> {
  static constexpr int64_t W = Vec<double>::W;
  double a[W] = {}, ab[W] = {}, a_lost[W] = {}, ab_lost[W] = {};

  static BNORM_INLINE void add_to(double* sum, double* lost, Vec<double> v) {
    const Vec<double> before = load(sum, Full{}, v), after = before + v, part = after - before;
    store(sum, Full{}, after);
    cpu::add_to(lost, (before - (after - part)) + (v - part));
  }
  BNORM_INLINE void add(Pair<Vec<double>> sums) {
    add_to(a, a_lost, sums.a);
    add_to(ab, ab_lost, sums.b);
  }
  BNORM_INLINE double total_a() const { return total(a, W) + total(a_lost, W); }
  BNORM_INLINE double total_ab() const { return total(ab, W) + total(ab_lost, W); }
};

// Adds one row of a channel to `lanes`.
template <typename V, int kCount, typename Load>
BNORM_INLINE void add_row(Offset at, int64_t length, const V (&k)[kCount], LaneSums<V>& lanes,
                          Load load_pair) {
  constexpr int64_t W = V::W;
  LaneSums<V> sums = lanes;  // a local copy, which the compiler keeps in registers
  int64_t i = 0;
  const auto whole = [&](int u)
                         BNORM_INLINE_LAMBDA { return load_pair(at + (i + u * W), Full{}, k); };
  for (; i + kTree<V> * W <= length; i += kTree<V> * W) sums.add(tree_sums<kTree<V>>(0, whole));
  for (; i + 4 * W <= length; i += 4 * W) sums.add(tree_sums<4>(0, whole));
  if (i < length) {
    Pair<V> v[4] = {};
    for_each_vector_by_four<V>(
        length - i, [&](int64_t j, int u, auto part) { v[u] = load_pair(at + (i + j), part, k); });
    sums.add(tree_sums<4>(0, [&](int u) { return v[u]; }));
  }
  lanes = sums;
}

// The coefficients of a tile's columns.
template <typename A, int kCount>
using ColumnCoefficients = const Columns<A> (&)[kCount];

// Adds kRows rows of a tile, from row `first` on, to the column sums a and ab. Only the first
// `width` columns.
template <typename V, int kRows, int kCount, typename Load>
BNORM_INLINE void add_rows(const Tile& tile, int64_t first, int64_t width,
                           ColumnCoefficients<typename V::Scalar, kCount> coefficients, double* a,
                           double* ab, Load load_pair) {
  const Offset at = tile.row(first);
  const int64_t stride = tile.stride, bit_stride = tile.stride + tile.padding;
  for_each_vector<V>(width, [&](int64_t j, auto part) BNORM_INLINE_LAMBDA {
    V k[kCount];
    for (int i = 0; i < kCount; ++i) k[i] = load_lane_order(coefficients[i].a + j, V{});
    const Pair<V> sums = tree_sums<kRows>(0, [&](int u) BNORM_INLINE_LAMBDA {
      return load_pair(Offset{at.element + j + u * stride, at.bit + j + u * bit_stride}, part, k);
    });
    add_to(a + j, sums.a);
    if (ab != nullptr) add_to(ab + j, sums.b);
  });
}

// The column sums of a tile: a and, unless ab is null, a * b.
template <typename V, int kCount, typename Load>
BNORM_INLINE void sum_columns(const Tile& tile, int64_t element_size,
                              ColumnCoefficients<typename V::Scalar, kCount> coefficients,
                              double* a, double* ab, Load load_pair) {
  for (int64_t j = 0; j < tile.width + V::W; ++j) a[j] = 0;
  if (ab != nullptr) {
    for (int64_t j = 0; j < tile.width + V::W; ++j) ab[j] = 0;
  }
  const auto add = [&](int64_t row, auto count) BNORM_INLINE_LAMBDA {
    add_rows<V, decltype(count)::value>(tile, row, tile.width, coefficients, a, ab, load_pair);
  };
  // Rows a multiple of 2 KB apart map to few sets of L1: fewer of them at a time, so that their
  // lines do not evict each other.
  const bool share_cache_sets = tile.stride * element_size % 2048 == 0;
  int64_t r = 0;
  for (; r + kTree<V> <= tile.rows && !share_cache_sets; r += kTree<V>) {
    add(r, std::integral_constant<int, kTree<V>>{});
  }
  for (; r + 4 <= tile.rows; r += 4) add(r, std::integral_constant<int, 4>{});
  for (; r < tile.rows; ++r) add(r, std::integral_constant<int, 1>{});
  add_rows<V, 1>(tile, tile.rows, tile.rest, coefficients, a, ab, load_pair);
}

// The sums of a and a * b over each of channels [c0, c1) of a span: sum_a[c - c0], sum_ab[c - c0].
// load_pair(at, Full | Part, k) returns a and b of a vector, 0 in the lanes beyond a Part (or NaN: the
// caller then sums again); k[i] is the channel's coefficients[i][c - c0].
template <typename T, int kCount, typename Load>
BNORM_INLINE void sums_of_pairs(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                const Acc<T>* const (&coefficients)[kCount], double* sum_a,
                                double* sum_ab, Load load_pair) {
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<Acc<T>> k[kCount];
    Columns<double> a, ab;
    const int64_t joined = samples_per_summed_row(shape);
    for_each_tile(shape, span, c0, c1, joined, [&](const Tile& tile) BNORM_INLINE_LAMBDA {
      for (int i = 0; i < kCount; ++i) {
        expand_to_columns<V>(tile, shape.S, coefficients[i] + (tile.c0 - c0), k[i].a);
      }
      sum_columns<V>(tile, sizeof(T), k, a.a, ab.a, load_pair);
      sum_by_channel<V>(tile, shape.S, a.a, sum_a + (tile.c0 - c0));
      sum_by_channel<V>(tile, shape.S, ab.a, sum_ab + (tile.c0 - c0));
    });
    return;
  }
  constexpr int64_t kRowChannels = 16;  // read in memory order; their lanes stay in L1
  for (int64_t c = c0; c < c1; c += kRowChannels) {
    const int64_t end = min(c + kRowChannels, c1);
    LaneSums<V> lanes[kRowChannels];
    for_each_row(shape, span, c, end,
                 [&](Offset first, int64_t length, int64_t j) BNORM_INLINE_LAMBDA {
                   V k[kCount];
                   for (int i = 0; i < kCount; ++i) k[i] = V::all(coefficients[i][c - c0 + j]);
                   add_row(first, length, k, lanes[j], load_pair);
                 });
    for (int64_t j = 0; j < end - c; ++j) {
      sum_a[c - c0 + j] = lanes[j].total_a();
      sum_ab[c - c0 + j] = lanes[j].total_ab();
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
