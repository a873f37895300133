// The CPU kernels, compiled once per instruction set by kernels_<isa>.cpp.
//
// Forward   mean, m2 of a chunk; y = fma(x - mean, scale, shift), scale = weight * rstd
// Backward  sums of dy and dy * xhat of a chunk; dx = ((dy - mean_dy) - xhat * mean_dy_xhat) *
// scale Source    Ioffe and Szegedy 2015, arXiv:1502.03167
//
// Numerics: the moments of a chunk are gathered in two passes over data that is in cache: a mean in
// the accumulation type, then sums of d = x - mean and d * d, so that nothing cancels however large
// the mean or however odd the first value; the sum of d mends the rounding of that mean. Lanes are
// added in double. Where a float sum is not finite the chunk is gathered again in double: then
// either the data is not finite, or float's range was exceeded although the result fits.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace bnorm_ext {
namespace cpu {
namespace {

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

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

// Calls f(offset) for the first element of each row of one channel in the span, and the number of
// elements from there on.
template <typename F>
BNORM_INLINE void each_row(const Shape& shape, const Span& span, int64_t c, F f) {
  for (int64_t n = span.n0; n < span.n1; ++n) {
    f((n * shape.C + c) * shape.S + span.s0, span.s1 - span.s0);
  }
}

// Calls f(offset) for each element of channel c in the span, in either layout.
template <typename F>
BNORM_INLINE void each_element(const Shape& shape, const Span& span, int64_t c, F f) {
  if (shape.layout == Layout::ChannelsLast) {
    for (int64_t row = span.s0; row < span.s1; ++row) f(row * shape.C + c);
  } else {
    each_row(shape, span, c, [&](int64_t offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i) f(offset + i);
    });
  }
}

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
  *out = {mean, m2};
}

template <typename T>
void sums_in_double(const BackwardParams& p, const Span& span, int64_t c, Sums* out) {
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const double mean = static_cast<const Acc<T>*>(p.mean)[c];
  const double rstd = static_cast<const Acc<T>*>(p.rstd)[c];
  *out = {0, 0};
  each_element(p.shape, span, c, [&](int64_t i) {
    out->dy += value(dy + i);
    out->dy_xhat += value(dy + i) * ((value(x + i) - mean) * rstd);
  });
}

// count values with sums d and d2 of (x - shift) and its square.
BNORM_INLINE Moments moments_about(double shift, double d, double d2, double count) {
  const double m2 = d2 - d * d / count;
  return {shift + d / count, m2 < 0 ? 0 : m2};
}

// ---- ChannelsFirst: one channel, rows of contiguous positions ---------------------------------

template <typename V>
struct FourSums {
  V v[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  BNORM_INLINE double total() const { return sum((v[0] + v[1]) + (v[2] + v[3])); }
};

template <typename T>
void moments_channels_first(const ForwardParams& p, const Span& span, int64_t c, Moments* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* x = static_cast<const T*>(p.x);
  const double count = static_cast<double>(span.count());

  FourSums<V> s;
  each_row(p.shape, span, c, [&](int64_t offset, int64_t length) {
    each_vector_of_four<A>(length, [&](int64_t i, int u, auto part) {
      s.v[u] = s.v[u] + load(x + offset + i, part, V::all(0));
    });
  });
  const A shift = static_cast<A>(s.total() / count);

  const V m = V::all(shift);
  FourSums<V> d1, d2;
  each_row(p.shape, span, c, [&](int64_t offset, int64_t length) {
    each_vector_of_four<A>(length, [&](int64_t i, int u, auto part) {
      const V d = load(x + offset + i, part, m) - m;
      d1.v[u] = d1.v[u] + d;
      d2.v[u] = fma(d, d, d2.v[u]);
    });
  });
  *out = moments_about(static_cast<double>(shift), d1.total(), d2.total(), count);
  if (!finite(out->m2)) moments_in_double<T>(p, span, c, out);
}

template <typename T>
void sums_channels_first(const BackwardParams& p, const Span& span, int64_t c, Sums* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const V mean = V::all(static_cast<const A*>(p.mean)[c]);
  const V rstd = V::all(static_cast<const A*>(p.rstd)[c]);

  FourSums<V> s1, s2;
  each_row(p.shape, span, c, [&](int64_t offset, int64_t length) {
    each_vector_of_four<A>(length, [&](int64_t i, int u, auto part) {
      const V g = load(dy + offset + i, part, V::all(0));
      const V xhat = (load(x + offset + i, part, mean) - mean) * rstd;
      s1.v[u] = s1.v[u] + g;
      s2.v[u] = fma(g, xhat, s2.v[u]);
    });
  });
  *out = {s1.total(), s2.total()};
  if (!finite(out->dy) || !finite(out->dy_xhat)) sums_in_double<T>(p, span, c, out);
}

// ---- ChannelsLast: vectors along the channels, four rows at a time ----------------------------

// Per-channel accumulators of one block of channels; a whole number of vectors, so that only
// accesses to tensors need a part.
template <typename A>
struct Block {
  alignas(64) A a[kChannelBlock];
  BNORM_INLINE Vec<A> get(int64_t i) const { return load(a + i, Full{}, Vec<A>::all(0)); }
  BNORM_INLINE void set(int64_t i, Vec<A> v) { store(a + i, Full{}, v); }
};

template <typename T>
void moments_channels_last(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1,
                           Moments* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t C = p.shape.C, width = c1 - c0;
  const T* x = static_cast<const T*>(p.x) + c0;
  const double count = static_cast<double>(span.count());
  const int64_t whole = span.s0 + (span.s1 - span.s0) / 4 * 4;  // rows taken four at a time
  Block<A> m, d1, d2;

  const V zero = V::all(0);
  each_vector<A>(width, [&](int64_t i, auto) { d1.set(i, zero); });
  for (int64_t r = span.s0; r < whole; r += 4) {
    const T* row = x + r * C;
    each_vector<A>(width, [&](int64_t i, auto part) {
      const V s01 = load(row + i, part, zero) + load(row + C + i, part, zero);
      const V s23 = load(row + 2 * C + i, part, zero) + load(row + 3 * C + i, part, zero);
      d1.set(i, d1.get(i) + (s01 + s23));
    });
  }
  for (int64_t r = whole; r < span.s1; ++r) {
    each_vector<A>(width, [&](int64_t i, auto part) {
      d1.set(i, d1.get(i) + load(x + r * C + i, part, zero));
    });
  }
  const V per_count = V::all(static_cast<A>(1.0 / count));
  each_vector<A>(width, [&](int64_t i, auto) {
    m.set(i, d1.get(i) * per_count);
    d1.set(i, zero);
    d2.set(i, zero);
  });
  for (int64_t r = span.s0; r < whole; r += 4) {
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
  for (int64_t r = whole; r < span.s1; ++r) {
    each_vector<A>(width, [&](int64_t i, auto part) {
      const V d = load(x + r * C + i, part, m.get(i)) - m.get(i);
      d1.set(i, d1.get(i) + d);
      d2.set(i, fma(d, d, d2.get(i)));
    });
  }
  for (int64_t i = 0; i < width; ++i) {
    out[i] = moments_about(m.a[i], d1.a[i], d2.a[i], count);
    if (!finite(out[i].m2)) moments_in_double<T>(p, span, c0 + i, out + i);
  }
}

template <typename T>
void sums_channels_last(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1,
                        Sums* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t C = p.shape.C, width = c1 - c0;
  const T* dy = static_cast<const T*>(p.dy) + c0;
  const T* x = static_cast<const T*>(p.x) + c0;
  const A* mean = static_cast<const A*>(p.mean) + c0;
  const A* rstd = static_cast<const A*>(p.rstd) + c0;
  Block<A> g1, g2;

  const V zero = V::all(0);
  each_vector<A>(width, [&](int64_t i, auto) {
    g1.set(i, zero);
    g2.set(i, zero);
  });
  int64_t r = span.s0;
  for (; r + 4 <= span.s1; r += 4) {
    each_vector<A>(width, [&](int64_t i, auto part) {
      const V mu = load(mean + i, part, zero);
      V g[4], centred[4];
      for (int64_t u = 0; u < 4; ++u) {
        g[u] = load(dy + (r + u) * C + i, part, zero);
        centred[u] = load(x + (r + u) * C + i, part, mu) - mu;
      }
      const V dot =
          fma(g[0], centred[0], g[1] * centred[1]) + fma(g[2], centred[2], g[3] * centred[3]);
      g1.set(i, g1.get(i) + ((g[0] + g[1]) + (g[2] + g[3])));
      g2.set(i, fma(dot, load(rstd + i, part, zero), g2.get(i)));
    });
  }
  for (; r < span.s1; ++r) {
    each_vector<A>(width, [&](int64_t i, auto part) {
      const V mu = load(mean + i, part, zero);
      const V g = load(dy + r * C + i, part, zero);
      const V xhat = (load(x + r * C + i, part, mu) - mu) * load(rstd + i, part, zero);
      g1.set(i, g1.get(i) + g);
      g2.set(i, fma(g, xhat, g2.get(i)));
    });
  }
  for (int64_t i = 0; i < width; ++i) {
    out[i] = {static_cast<double>(g1.a[i]), static_cast<double>(g2.a[i])};
    if (!finite(out[i].dy) || !finite(out[i].dy_xhat)) sums_in_double<T>(p, span, c0 + i, out + i);
  }
}

// ---- Both layouts -----------------------------------------------------------------------------

template <typename T>
void moments(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1, Moments* out) {
  if (p.shape.layout == Layout::ChannelsLast) {
    moments_channels_last<T>(p, span, c0, c1, out);
  } else {
    moments_channels_first<T>(p, span, c0, out);
  }
}

template <typename T>
void sums(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1, Sums* out) {
  if (p.shape.layout == Layout::ChannelsLast) {
    sums_channels_last<T>(p, span, c0, c1, out);
  } else {
    sums_channels_first<T>(p, span, c0, out);
  }
}

// The one expression of the normalisation.
template <typename V>
BNORM_INLINE V normalise(V x, V mean, V scale, V shift) {
  return fma(x - mean, scale, shift);
}

template <typename V>
BNORM_INLINE V input_gradient(V dy, V x, V mean, V rstd, V mean_dy, V mean_dy_xhat, V scale) {
  return ((dy - mean_dy) - ((x - mean) * rstd) * mean_dy_xhat) * scale;
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
  if (p.shape.layout == Layout::ChannelsLast) {
    for (int64_t r = span.s0; r < span.s1; ++r) {
      T* row = y + r * p.shape.C + c0;
      each_vector_to<A>(row, c1 - c0, p.stream, [&](int64_t i, auto part, auto how) {
        const int64_t c = c0 + i, at = r * p.shape.C + c;
        store(row + i, part,
              normalise(load(x + at, part, zero), load(mean + c, part, zero),
                        load(scale + c, part, zero), load(shift + c, part, zero)),
              how);
      });
    }
    if (p.stream) fence();
    return;
  }
  const V m = V::all(mean[c0]), a = V::all(scale[c0]), b = V::all(shift[c0]);
  each_row(p.shape, span, c0, [&](int64_t offset, int64_t length) {
    each_vector_to<A>(y + offset, length, p.stream, [&](int64_t i, auto part, auto how) {
      store(y + offset + i, part, normalise(load(x + offset + i, part, zero), m, a, b), how);
    });
  });
  if (p.stream) fence();
}

template <typename T>
void dx(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const A* mean = static_cast<const A*>(p.mean);
  const A* rstd = static_cast<const A*>(p.rstd);
  const A* mean_dy = static_cast<const A*>(p.mean_dy);
  const A* mean_dy_xhat = static_cast<const A*>(p.mean_dy_xhat);
  const A* scale = static_cast<const A*>(p.scale);
  const V zero = V::all(0);
  if (p.shape.layout == Layout::ChannelsLast) {
    for (int64_t r = span.s0; r < span.s1; ++r) {
      T* row = dx + r * p.shape.C + c0;
      each_vector_to<A>(row, c1 - c0, p.stream, [&](int64_t i, auto part, auto how) {
        const int64_t c = c0 + i, at = r * p.shape.C + c;
        store(row + i, part,
              input_gradient(load(dy + at, part, zero), load(x + at, part, zero),
                             load(mean + c, part, zero), load(rstd + c, part, zero),
                             load(mean_dy + c, part, zero), load(mean_dy_xhat + c, part, zero),
                             load(scale + c, part, zero)),
              how);
      });
    }
    if (p.stream) fence();
    return;
  }
  const V m = V::all(mean[c0]), r = V::all(rstd[c0]), s = V::all(scale[c0]);
  const V k1 = V::all(mean_dy[c0]), k2 = V::all(mean_dy_xhat[c0]);
  each_row(p.shape, span, c0, [&](int64_t offset, int64_t length) {
    each_vector_to<A>(dx + offset, length, p.stream, [&](int64_t i, auto part, auto how) {
      const int64_t at = offset + i;
      store(dx + at, part,
            input_gradient(load(dy + at, part, zero), load(x + at, part, zero), m, r, k1, k2, s),
            how);
    });
  });
  if (p.stream) fence();
}

}  // namespace

#define BNORM_JOIN(a, b) a##b
#define BNORM_NAME(a, b) BNORM_JOIN(a, b)
#define BNORM_STRING(a) #a
#define BNORM_TEXT(a) BNORM_STRING(a)

const KernelTable BNORM_NAME(kernels_, BNORM_EXT_ISA) = {
    BNORM_TEXT(BNORM_EXT_ISA),
    {moments<float>, moments<double>, moments<Half>, moments<BFloat16>},
    {apply<float>, apply<double>, apply<Half>, apply<BFloat16>},
    {sums<float>, sums<double>, sums<Half>, sums<BFloat16>},
    {dx<float>, dx<double>, dx<Half>, dx<BFloat16>},
};

}  // namespace cpu
}  // namespace bnorm_ext
