// The backward kernels.
//
// Formula   With xhat = (x - mean) * rstd: sums of dy and dy * xhat of a chunk, and
//           dx = ((dy - mean_dy) - xhat * mean_dy_xhat) * scale, scale = weight * rstd;
//           in inference, where the statistics are constants, dx = dy * scale
//           (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     sums: reads dy and x; dx: reads dy and x, writes dx
// Numerics  Products and lane sums in the accumulation type, lanes and chunks added in double.
//           Where a float sum is not finite the chunk is gathered again in double.
#pragma once

#include "walk.h"

namespace bnorm_ext {
namespace cpu {
namespace {

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

// ChannelsFirst: at most kGroup channels, rows of contiguous positions.
template <typename T, int kGroup>
void sums_channels_first(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1,
                         Sums* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  V mean[kGroup], rstd[kGroup];
  for (int64_t c = c0; c < c1; ++c) {
    mean[c - c0] = V::all(static_cast<const A*>(p.mean)[c]);
    rstd[c - c0] = V::all(static_cast<const A*>(p.rstd)[c]);
  }
  ChannelAccumulator<A> s[kGroup];
  each_row(p.shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
    const V m = mean[k], r = rstd[k];
    s[k].row(offset, length, [&](int64_t at, auto part, V& s1, V& s2) {
      fetch_next(dy + at);
      fetch_next(x + at);
      const V g = load(dy + at, part, V::all(0));
      const V xhat = (load(x + at, part, m) - m) * r;
      s1 = s1 + g;
      s2 = fma(g, xhat, s2);
    });
  });
  for (int64_t c = c0; c < c1; ++c) {
    Sums& of_c = out[c - c0];
    of_c = {s[c - c0].total1(), s[c - c0].total2()};
    if (!finite(of_c.dy) || !finite(of_c.dy_xhat)) sums_in_double<T>(p, span, c, &of_c);
  }
}

// ChannelsLast: vectors along the channels, four rows at a time.
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
  const V zero = V::all(0);
  ChannelBlock<A> g1, g2;

  double total1[kChannelBlock] = {}, total2[kChannelBlock] = {};
  for (int64_t begin = span.s0; begin < span.s1; begin += kRowsPerBlock) {
    const int64_t end = smaller(begin + kRowsPerBlock, span.s1);
    g1.clear();
    g2.clear();
    int64_t r = begin;
    for (; r + 4 <= end; r += 4) {
      each_vector<A>(width, [&](int64_t i, auto part) {
        const V mu = load(mean + i, part, zero), rs = load(rstd + i, part, zero);
        V g[4], xhat[4];
        for (int64_t u = 0; u < 4; ++u) {
          g[u] = load(dy + (r + u) * C + i, part, zero);
          xhat[u] = (load(x + (r + u) * C + i, part, mu) - mu) * rs;
        }
        const V dot = fma(g[0], xhat[0], g[1] * xhat[1]) + fma(g[2], xhat[2], g[3] * xhat[3]);
        g1.set(i, g1.get(i) + ((g[0] + g[1]) + (g[2] + g[3])));
        g2.set(i, g2.get(i) + dot);
      });
    }
    for (; r < end; ++r) {
      each_vector<A>(width, [&](int64_t i, auto part) {
        const V mu = load(mean + i, part, zero);
        const V g = load(dy + r * C + i, part, zero);
        const V xhat = (load(x + r * C + i, part, mu) - mu) * load(rstd + i, part, zero);
        g1.set(i, g1.get(i) + g);
        g2.set(i, fma(g, xhat, g2.get(i)));
      });
    }
    g1.empty_into(total1, width);
    g2.empty_into(total2, width);
  }
  for (int64_t i = 0; i < width; ++i) {
    out[i] = {total1[i], total2[i]};
    if (!finite(out[i].dy) || !finite(out[i].dy_xhat)) sums_in_double<T>(p, span, c0 + i, out + i);
  }
}

template <typename T>
void sums(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1, Sums* out) {
  if (p.shape.layout == Layout::ChannelsLast) {
    sums_channels_last<T>(p, span, c0, c1, out);
  } else if (c1 - c0 == 1) {
    sums_channels_first<T, 1>(p, span, c0, c1, out);
  } else {
    sums_channels_first<T, kChannelGroup>(p, span, c0, c1, out);
  }
}

template <typename V>
BNORM_INLINE V input_gradient(V dy, V x, V mean, V rstd, V mean_dy, V mean_dy_xhat, V scale) {
  return ((dy - mean_dy) - ((x - mean) * rstd) * mean_dy_xhat) * scale;
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
  // Read once: the compiler must think that a store may change them.
  const int64_t C = p.shape.C, ahead = p.ahead;
  const bool stream = p.stream;
  // In inference dx does not depend on x, be it infinite.
  const bool constant_statistics = mean_dy == nullptr;
  if (p.shape.layout == Layout::ChannelsLast) {
    for (int64_t r = span.s0; r < span.s1; ++r) {
      T* row = dx + r * C + c0;
      each_vector_to<A>(row, c1 - c0, stream, [&](int64_t i, auto part, auto how) {
        const int64_t c = c0 + i, at = r * C + c;
        const V g = load(dy + at, part, zero), s = load(scale + c, part, zero);
        store(row + i, part,
              constant_statistics
                  ? g * s
                  : input_gradient(g, load(x + at, part, zero), load(mean + c, part, zero),
                                   load(rstd + c, part, zero), load(mean_dy + c, part, zero),
                                   load(mean_dy_xhat + c, part, zero), s),
              how);
      });
    }
    return;
  }
  each_row(p.shape, span, c0, c1, [&](int64_t offset, int64_t length, int64_t k) {
    const int64_t c = c0 + k;
    const V s = V::all(scale[c]);
    if (constant_statistics) {
      each_vector_to<A>(dx + offset, length, stream, [&](int64_t i, auto part, auto how) {
        store(dx + offset + i, part, load(dy + offset + i, part, zero) * s, how);
      });
      return;
    }
    const V m = V::all(mean[c]), r = V::all(rstd[c]);
    const V k1 = V::all(mean_dy[c]), k2 = V::all(mean_dy_xhat[c]);
    each_vector_to<A>(dx + offset, length, stream, [&](int64_t i, auto part, auto how) {
      const int64_t at = offset + i;
      fetch_ahead(dy + at + ahead, how);
      fetch_ahead(x + at + ahead, how);
      store(dx + at, part,
            input_gradient(load(dy + at, part, zero), load(x + at, part, zero), m, r, k1, k2, s),
            how);
    });
  });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
