// The backward kernels.
//
// Formula   With xhat = (x - mean) * rstd: sums of dy and dy * xhat of a chunk, and
//           dx = ((dy - mean_dy) - xhat * mean_dy_xhat) * scale, scale = weight * rstd;
//           in inference, where the statistics are constants, dx = dy * scale
//           (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     sums: reads dy and x; dx: reads dy and x, writes dx
// Numerics  Products and trees of 16 in the accumulation type, added up in double. Where a sum
//           is not finite the chunk is gathered again in double.
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

// Channels [c0, c1), at most kChannelBlock of them.
template <typename T>
void sums(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1, Sums* out) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const A* mean = static_cast<const A*>(p.mean) + c0;
  const A* rstd = static_cast<const A*>(p.rstd) + c0;
  double sum_dy[kChannelBlock], dot[kChannelBlock];
  sums_of_pairs<T>(p.shape, span, c0, c1, mean, sum_dy, dot, [=](int64_t at, auto part, V m) {
    return Pair<V>{load(dy + at, part, V::all(0)), load(x + at, part, m) - m};
  });
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = {sum_dy[k], dot[k] * static_cast<double>(rstd[k])};
    if (!finite(out[k].dy) || !finite(out[k].dy_xhat)) {
      sums_in_double<T>(p, span, c0 + k, out + k);
    }
  }
}

template <typename V>
BNORM_INLINE V input_gradient(V dy, V x, V mean, V rstd, V mean_dy, V mean_dy_xhat, V scale) {
  return ((dy - mean_dy) - ((x - mean) * rstd) * mean_dy_xhat) * scale;
}

template <typename T>
void dx(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const A* scale = static_cast<const A*>(p.scale);
  const V zero = V::all(0);
  if (p.mean_dy == nullptr) {  // in inference dx does not depend on x, be it infinite
    const A* const coefficients[] = {scale};
    each_vector_of_span(p.shape, span, c0, c1, coefficients, dx, p.stream,
                        [=](int64_t at, auto part, auto how, const V(&k)[1]) {
                          store(dx + at, part, load(dy + at, part, zero) * k[0], how);
                        });
    return;
  }
  const A* const coefficients[] = {static_cast<const A*>(p.mean), static_cast<const A*>(p.rstd),
                                   static_cast<const A*>(p.mean_dy),
                                   static_cast<const A*>(p.mean_dy_xhat), scale};
  const int64_t ahead = p.ahead;  // read once: the compiler must think that a store may change it
  each_vector_of_span(p.shape, span, c0, c1, coefficients, dx, p.stream,
                      [=](int64_t at, auto part, auto how, const V(&k)[5]) {
                        fetch_ahead(dy + at + ahead, how);
                        fetch_ahead(x + at + ahead, how);
                        const V g = load(dy + at, part, zero), v = load(x + at, part, zero);
                        store(dx + at, part, input_gradient(g, v, k[0], k[1], k[2], k[3], k[4]),
                              how);
                      });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
