// What the forward and the backward kernels share: the way through a chunk, sums over it, and an
// elementwise pass.
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

// Calls f(offset, length, channel - c0) for each row of some channels in the span: its first
// element, and how many. In the order of memory.
template <typename F>
BNORM_INLINE void each_row(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  for (int64_t n = span.n0; n < span.n1; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      f((n * shape.C + c) * shape.S + span.s0, span.s1 - span.s0, c - c0);
    }
  }
}

// Calls f(offset) for each element of channel c in the span.
template <typename F>
BNORM_INLINE void each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  each_row(shape, span, c, c + 1, [&](int64_t offset, int64_t length, int64_t) {
    for (int64_t i = 0; i < length; ++i) f(offset + i);
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
// columns only. Column j belongs to channel c0 + j / S % (c1 - c0).
struct Tile {
  int64_t c0, c1;
  int64_t at, stride, rows, width, rest;

  int64_t rest_at() const { return at + rows * stride; }
  int64_t copies(int64_t S) const { return width / ((c1 - c0) * S); }
};

// Calls f(tile) for tiles that cover channels [c0, c1) of the span. Where a sample is shorter than
// a few vectors, some in a row make one row of the tile; then all channels have to be asked for.
template <typename F>
BNORM_INLINE void each_tile(const Shape& shape, const Span& span, int64_t c0, int64_t c1, F f) {
  const int64_t S = shape.S, sample = shape.C * S, samples = span.n1 - span.n0;
  const int64_t k = is_folded(shape) ? fold(sample) : 1;
  const int64_t step = is_folded(shape) ? shape.C : tile_channels(S);
  for (int64_t c = c0; c < c1; c += step) {
    const int64_t end = smaller(c + step, c1), width = (end - c) * S;
    f(Tile{c, end, span.n0 * sample + c * S, k * sample, samples / k, k * width,
           samples % k * width});
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

// ---- Sums -------------------------------------------------------------------------------------

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
template <typename V, typename Load>
BNORM_INLINE void add_row(int64_t at, int64_t length, V mean, Lanes<V>& lanes, Load load_pair) {
  constexpr int64_t W = V::W;
  Lanes<V> sums = lanes;  // which the compiler keeps in registers
  int64_t i = 0;
  const auto whole = [&](int u) { return load_pair(at + i + u * W, Full{}, mean); };
  for (; i + kTree<V> * W <= length; i += kTree<V> * W) sums.add(tree<kTree<V>>(0, whole));
  for (; i + 4 * W <= length; i += 4 * W) sums.add(tree<4>(0, whole));
  if (i < length) {
    Pair<V> v[4] = {};
    each_vector_of_four<V>(
        length - i, [&](int64_t j, int u, auto part) { v[u] = load_pair(at + i + j, part, mean); });
    sums.add(tree<4>(0, [&](int u) { return v[u]; }));
  }
  lanes = sums;
}

// kRows rows of a tile.
template <typename V, int kRows, typename Load>
BNORM_INLINE void add_rows(int64_t at, int64_t stride, int64_t width,
                           const typename V::Scalar* mean, double* a, double* ab, Load load_pair) {
  each_vector<V>(width, [&](int64_t j, auto part) {
    const V m = load_lanes(mean + j, V{});
    const Pair<V> sums =
        tree<kRows>(0, [&](int u) { return load_pair(at + u * stride + j, part, m); });
    add_to(a + j, sums.a);
    if (ab != nullptr) add_to(ab + j, sums.b);
  });
}

// Sums down the columns of a tile, of a * b where there is a place for it.
template <typename V, typename Load>
BNORM_INLINE void sum_columns(const Tile& tile, int64_t element_size,
                              const typename V::Scalar* mean, double* a, double* ab,
                              Load load_pair) {
  for (int64_t j = 0; j < tile.width + V::W; ++j) a[j] = 0;
  if (ab != nullptr) {
    for (int64_t j = 0; j < tile.width + V::W; ++j) ab[j] = 0;
  }
  const auto take = [&](int64_t row, auto count) {
    add_rows<V, decltype(count)::value>(tile.at + row * tile.stride, tile.stride, tile.width, mean,
                                        a, ab, load_pair);
  };
  // Rows that are whole pages apart would share one set of the first cache.
  const bool crowded = tile.stride * element_size % 2048 == 0;
  int64_t r = 0;
  for (; r + kTree<V> <= tile.rows && !crowded; r += kTree<V>) {
    take(r, std::integral_constant<int, kTree<V>>{});
  }
  for (; r + 4 <= tile.rows; r += 4) take(r, std::integral_constant<int, 4>{});
  for (; r < tile.rows; ++r) take(r, std::integral_constant<int, 1>{});
  add_rows<V, 1>(tile.rest_at(), 0, tile.rest, mean, a, ab, load_pair);
}

// Sums of a and a * b over channels [c0, c1) of a span: sum_a[c - c0], sum_ab[c - c0], where
// load_pair(offset, Full | Part, mean of the channel) gives a and b, and zeros beyond a Part.
template <typename T, typename Load>
BNORM_INLINE void sums_of_pairs(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                const Acc<T>* mean, double* sum_a, double* sum_ab, Load load_pair) {
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<Acc<T>> m;
    Columns<double> a, ab;
    each_tile(shape, span, c0, c1, [&](const Tile& tile) {
      spread<V>(tile, shape.S, mean + (tile.c0 - c0), m.a);
      sum_columns<V>(tile, sizeof(T), m.a, a.a, ab.a, load_pair);
      gather<V>(tile, shape.S, a.a, sum_a + (tile.c0 - c0));
      gather<V>(tile, shape.S, ab.a, sum_ab + (tile.c0 - c0));
    });
    return;
  }
  constexpr int64_t kRowChannels = 16;  // in the order of memory; their lanes stay in L1
  for (int64_t c = c0; c < c1; c += kRowChannels) {
    const int64_t end = smaller(c + kRowChannels, c1);
    Lanes<V> lanes[kRowChannels];
    each_row(shape, span, c, end, [&](int64_t offset, int64_t length, int64_t k) {
      add_row(offset, length, V::all(mean[c - c0 + k]), lanes[k], load_pair);
    });
    for (int64_t k = 0; k < end - c; ++k) {
      sum_a[c - c0 + k] = total(lanes[k].a, V::W);
      sum_ab[c - c0 + k] = total(lanes[k].ab, V::W);
    }
  }
}

// ---- Elementwise ------------------------------------------------------------------------------

// In an elementwise pass rows are taken across the samples below this many positions only.
constexpr int64_t kTinyRow = 16;

// Calls f(offset, Full | Part, how, k) for every vector of channels [c0, c1) of a span, where k[i]
// are the coefficients of its lanes, from the arrays coefficients[i][c], and `how` is the way to
// store at out + offset.
template <typename T, int kCount, typename F>
BNORM_INLINE void each_vector_of_span(const Shape& shape, const Span& span, int64_t c0, int64_t c1,
                                      const Acc<T>* const (&coefficients)[kCount], T* out,
                                      bool stream, F f) {
  using V = VectorOf<T>;
  if (shape.S >= kTinyRow) {
    each_row(shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
      V of_row[kCount];
      for (int i = 0; i < kCount; ++i) of_row[i] = V::all(coefficients[i][c0 + k]);
      each_vector_to<V>(out + offset, length, stream,
                        [&](int64_t i, auto part, auto how) { f(offset + i, part, how, of_row); });
    });
    return;
  }
  Columns<Acc<T>> columns[kCount];
  each_tile(shape, span, c0, c1, [&](const Tile& tile) {
    for (int i = 0; i < kCount; ++i) {
      spread<V>(tile, shape.S, coefficients[i] + tile.c0, columns[i].a);
    }
    for (int64_t r = 0; r <= tile.rows; ++r) {
      const int64_t offset = tile.at + r * tile.stride;
      const int64_t width = r < tile.rows ? tile.width : tile.rest;
      // Columns by even and odd places can be had from whole vectors on only.
      const bool whole = std::is_same<V, EvenOdd>::value && !is_aligned<V>(out + offset);
      each_vector_to<V>(out + offset, width, stream && !whole, [&](int64_t j, auto part, auto how) {
        V k[kCount];
        for (int i = 0; i < kCount; ++i) k[i] = load_lanes(columns[i].a + j, V{});
        f(offset + j, part, how, k);
      });
    }
  });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
