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

// Rows of a tile that are added up in the data's precision before they go to the column sums in
// double. More of those of doubles, whose column sums round too.
template <typename V>
constexpr int kRowsAtOnce = std::is_same<V, Vec<double>>::value ? 16 : 4;
// How many rows ahead memory is prefetched, and of which rows: those shorter than so many bytes.
constexpr int64_t kRowsAhead = 16, kPrefetchedRow = 4096;

// Goes through the rows of a tile in memory order, cache line by cache line.
class LinesOfRows {
 public:
  LinesOfRows(const Tile& tile, int64_t row, int64_t element_size)
      : at_(tile.row(row).element),
        left_(tile.width),
        width_(tile.width),
        gap_(tile.stride - tile.width),
        line_(64 / element_size) {}

  // Calls f(element) for the first element of each line of the next `elements`.
  template <typename F>
  BNORM_INLINE void next(int64_t elements, F f) {
    for (; elements > 0; elements -= line_) {
      f(at_);
      at_ += line_;
      left_ -= line_;
      if (left_ > 0) continue;
      at_ += left_ + gap_;  // to the beginning of the next row
      left_ = width_;
    }
  }

 private:
  int64_t at_, left_, width_, gap_, line_;
};

// Adds kRows rows of a tile, from row `first` on, to the column sums a and ab. Only the first
// `width` columns. Meanwhile ahead(element) is called for the lines of as many rows further on.
template <typename V, int kRows, int kCount, typename Load, typename Ahead>
BNORM_INLINE void add_rows(const Tile& tile, int64_t first, int64_t width, int64_t element_size,
                           ColumnCoefficients<typename V::Scalar, kCount> coefficients, double* a,
                           double* ab, Load load_pair, Ahead ahead) {
  const Offset at = tile.row(first);
  const int64_t stride = tile.stride, bit_stride = tile.stride + tile.padding;
  LinesOfRows lines(tile, first + kRowsAhead, element_size);
  for_each_vector<V>(width, [&](int64_t j, auto part) BNORM_INLINE_LAMBDA {
    V k[kCount];
    for (int i = 0; i < kCount; ++i) k[i] = load_lane_order(coefficients[i].a + j, V{});
    if (kRows > 1) lines.next(kRows * V::W, ahead);
    const Pair<V> sums = tree_sums<kRows>(0, [&](int u) BNORM_INLINE_LAMBDA {
      return load_pair(Offset{at.element + j + u * stride, at.bit + j + u * bit_stride}, part, k);
    });
    add_to(a + j, sums.a);
    if (ab != nullptr) add_to(ab + j, sums.b);
  });
}

// The column sums of a tile: a and, unless ab is null, a * b.
//
// Four rows at a time are four strided streams of each tensor, which the hardware's prefetchers
// follow within a page, but not from one row of less than that to the next four. Such rows are
// prefetched in memory order (bench/NOTES.md, 43); not beyond a tile that has other columns beside
// it, since those are what comes next in memory.
template <typename V, int kCount, typename Load, typename Ahead>
BNORM_INLINE void sum_columns(const Tile& tile, int64_t element_size,
                              ColumnCoefficients<typename V::Scalar, kCount> coefficients,
                              double* a, double* ab, Load load_pair, Ahead ahead) {
  for (int64_t j = 0; j < tile.width + V::W; ++j) a[j] = 0;
  if (ab != nullptr) {
    for (int64_t j = 0; j < tile.width + V::W; ++j) ab[j] = 0;
  }
  const auto add = [&](int64_t row, auto count, auto prefetched) BNORM_INLINE_LAMBDA {
    add_rows<V, decltype(count)::value>(tile, row, tile.width, element_size, coefficients, a, ab,
                                        load_pair, prefetched);
  };
  const auto nothing = [](int64_t) BNORM_INLINE_LAMBDA {};
  constexpr std::integral_constant<int, kRowsAtOnce<V>> many{};
  constexpr std::integral_constant<int, 4> some{};
  constexpr std::integral_constant<int, 1> one{};
  int64_t r = 0, ahead_until = 0;
  if (tile.width * element_size < kPrefetchedRow) {
    ahead_until = tile.width == tile.stride ? tile.rows : tile.rows - kRowsAhead;
  }
  for (; r + many <= ahead_until; r += many) add(r, many, ahead);
  for (; r + many <= tile.rows; r += many) add(r, many, nothing);
  for (; r + some <= tile.rows; r += some) add(r, some, nothing);
  for (; r < tile.rows; ++r) add(r, one, nothing);
  add_rows<V, 1>(tile, tile.rows, tile.rest, element_size, coefficients, a, ab, load_pair, nothing);
}

// The sums of a and a * b over each of channels [c0, c1) of a span: sum_a[c - c0], sum_ab[c - c0].
// load_pair(at, Full | Part, k) returns a and b of a vector, 0 in the lanes beyond a Part (or NaN: the
// caller then sums again); k[i] is the channel's coefficients[i][c - c0]. ahead(element) prefetches
// the cache line of an element of all that load_pair reads.
template <typename T, int kCount, typename Load, typename Ahead>
BNORM_INLINE void sums_of_pairs(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                const Acc<T>* const (&coefficients)[kCount], double* sum_a,
                                double* sum_ab, Load load_pair, Ahead ahead) {
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<Acc<T>> k[kCount];
    Columns<double> a, ab;
    const int64_t joined = samples_per_summed_row(shape);
    for_each_tile(shape, span, c0, c1, joined, [&](const Tile& tile) BNORM_INLINE_LAMBDA {
      for (int i = 0; i < kCount; ++i) {
        expand_to_columns<V>(tile, shape.S, coefficients[i] + (tile.c0 - c0), k[i].a);
      }
      sum_columns<V>(tile, sizeof(T), k, a.a, ab.a, load_pair, ahead);
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
