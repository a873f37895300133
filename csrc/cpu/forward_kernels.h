// The forward kernels.
//
// Formula   mean and m2 = sum((x - mean)^2) of a chunk; y = fma(x - mean, scale, shift) with
//           scale = weight * rstd, shift = bias (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     moments: reads x (a second time from L1 or L2); apply: reads x, writes y
// Numerics  The moments of a chunk are gathered in two passes over data that is in cache: a mean in
//           the accumulation type, then sums of d = x - mean and d * d, so that nothing cancels
//           however large the mean or however odd the first value; the sum of d mends the rounding
//           of that mean. Lanes are added in double. Where a float sum is not finite the chunk is
//           gathered again in double: then either the data is not finite, or float's range was
//           exceeded although the result fits.
#pragma once

#include "walk.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Channel c of the chunk once more, in double throughout.
template <typename T>
void moments_in_double(const ForwardParams& p, const Span& span, int64_t c, Moments* out) {
  const T* x = static_cast<const T*>(p.x);
  double total = 0, m2 = 0;
  each_element(p.shape, span, c, [&](int64_t i) { total += value(x + i); });
  const double mean = total / static_cast<double>(span.count());
  each_element(p.shape, span, c, [&](int64_t i) {
    const double d = value(x + i) - mean;
    m2 += d * d;
  });
  *out = {mean, 0, m2};
}

// count values with sums d and d2 of (x - shift) and its square.
BNORM_INLINE Moments moments_about(double shift, double d, double d2, double count) {
  const double m2 = d2 - d * d / count;
  return {shift, d / count, m2 < 0 ? 0 : m2};
}

// ChannelsFirst: at most kGroup channels, rows of contiguous positions.
template <typename T, int kGroup>
void moments_channels_first(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1,
                            Moments* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* x = static_cast<const T*>(p.x);
  const double count = static_cast<double>(span.count());

  // Near the mean is enough: the sum of deviations mends the rest.
  V sum4[kGroup][4];
  for (int64_t k = 0; k < c1 - c0; ++k) {
    for (V& lane : sum4[k]) lane = V::all(0);
  }
  each_row(p.shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
    V of_row[4] = {sum4[k][0], sum4[k][1], sum4[k][2], sum4[k][3]};
    each_vector_of_four<A>(length, [&](int64_t i, int u, auto part) {
      of_row[u] = of_row[u] + load(x + offset + i, part, V::all(0));
    });
    for (int u = 0; u < 4; ++u) sum4[k][u] = of_row[u];
  });
  A shift[kGroup] = {};
  for (int64_t k = 0; k < c1 - c0; ++k) {
    const V total = (sum4[k][0] + sum4[k][1]) + (sum4[k][2] + sum4[k][3]);
    shift[k] = static_cast<A>(sum(total) / count);
  }

  ChannelAccumulator<A> d[kGroup];
  each_row(p.shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
    const V m = V::all(shift[k]);
    d[k].row(offset, length, [&](int64_t at, auto part, V& d1, V& d2) {
      const V deviation = load(x + at, part, m) - m;
      d1 = d1 + deviation;
      d2 = fma(deviation, deviation, d2);
    });
  });
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = moments_about(static_cast<double>(shift[k]), d[k].total1(), d[k].total2(), count);
    if (!finite(out[k].m2)) moments_in_double<T>(p, span, c0 + k, out + k);
  }
}

// ChannelsLast: vectors along the channels, four rows at a time.
template <typename T>
void moments_channels_last(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1,
                           Moments* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t C = p.shape.C, width = c1 - c0;
  const T* x = static_cast<const T*>(p.x) + c0;
  const double count = static_cast<double>(span.count());
  const V zero = V::all(0);
  ChannelBlock<A> m, d1, d2;

  d1.clear();
  int64_t r = span.s0;
  for (; r + 4 <= span.s1; r += 4) {
    const T* row = x + r * C;
    each_vector<A>(width, [&](int64_t i, auto part) {
      const V s01 = load(row + i, part, zero) + load(row + C + i, part, zero);
      const V s23 = load(row + 2 * C + i, part, zero) + load(row + 3 * C + i, part, zero);
      d1.set(i, d1.get(i) + (s01 + s23));
    });
  }
  for (; r < span.s1; ++r) {
    each_vector<A>(width, [&](int64_t i, auto part) {
      d1.set(i, d1.get(i) + load(x + r * C + i, part, zero));
    });
  }
  // Near the mean is enough: the sum of deviations mends the rest.
  const V per_count = V::all(static_cast<A>(1.0 / count));
  each_vector<A>(width, [&](int64_t i, auto) { m.set(i, d1.get(i) * per_count); });

  double total1[kChannelBlock] = {}, total2[kChannelBlock] = {};
  for (int64_t begin = span.s0; begin < span.s1; begin += kRowsPerBlock) {
    const int64_t end = smaller(begin + kRowsPerBlock, span.s1);
    d1.clear();
    d2.clear();
    for (r = begin; r + 4 <= end; r += 4) {
      const T* row = x + r * C;
      each_vector<A>(width, [&](int64_t i, auto part) {
        const V mean = m.get(i);
        const V a = load(row + i, part, mean) - mean;
        const V b = load(row + C + i, part, mean) - mean;
        const V c = load(row + 2 * C + i, part, mean) - mean;
        const V d = load(row + 3 * C + i, part, mean) - mean;
        d1.set(i, d1.get(i) + ((a + b) + (c + d)));
        d2.set(i, d2.get(i) + (fma(a, a, b * b) + fma(c, c, d * d)));
      });
    }
    for (; r < end; ++r) {
      each_vector<A>(width, [&](int64_t i, auto part) {
        const V d = load(x + r * C + i, part, m.get(i)) - m.get(i);
        d1.set(i, d1.get(i) + d);
        d2.set(i, fma(d, d, d2.get(i)));
      });
    }
    d1.empty_into(total1, width);
    d2.empty_into(total2, width);
  }
  for (int64_t i = 0; i < width; ++i) {
    out[i] = moments_about(m.a[i], total1[i], total2[i], count);
    if (!finite(out[i].m2)) moments_in_double<T>(p, span, c0 + i, out + i);
  }
}

template <typename T>
void moments(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1, Moments* out) {
  if (p.shape.layout == Layout::ChannelsLast) {
    moments_channels_last<T>(p, span, c0, c1, out);
  } else if (c1 - c0 == 1) {
    moments_channels_first<T, 1>(p, span, c0, c1, out);
  } else {
    moments_channels_first<T, kChannelGroup>(p, span, c0, c1, out);
  }
}

// The one expression of the normalisation.
template <typename V>
BNORM_INLINE V normalise(V x, V mean, V scale, V shift) {
  return fma(x - mean, scale, shift);
}

template <typename T>
void apply(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  const V zero = V::all(0);
  // Read once: the compiler must think that a store may change them.
  const int64_t C = p.shape.C, ahead = p.ahead;
  const bool stream = p.stream;
  if (p.shape.layout == Layout::ChannelsLast) {
    for (int64_t r = span.s0; r < span.s1; ++r) {
      T* row = y + r * C + c0;
      each_vector_to<A>(row, c1 - c0, stream, [&](int64_t i, auto part, auto how) {
        const int64_t c = c0 + i, at = r * C + c;
        store(row + i, part,
              normalise(load(x + at, part, zero), load(mean + c, part, zero),
                        load(scale + c, part, zero), load(shift + c, part, zero)),
              how);
      });
    }
    return;
  }
  each_row(p.shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
    const V m = V::all(mean[c0 + k]), a = V::all(scale[c0 + k]), b = V::all(shift[c0 + k]);
    each_vector_to<A>(y + offset, length, stream, [&](int64_t i, auto part, auto how) {
      fetch_ahead(x + offset + i + ahead, how);
      store(y + offset + i, part, normalise(load(x + offset + i, part, zero), m, a, b), how);
    });
  });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
