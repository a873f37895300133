// The backward kernels.
//
// Formula   With xhat = (x - mean) * rstd and g the gradient of z = fma(x - mean, scale, shift) +
//           residual, g = dy * act'(z): sums of g and g * xhat of a chunk, and
//           dx = ((g - mean_g) - xhat * mean_g_xhat) * scale, scale = weight * rstd; in inference,
//           where the statistics are constants, dx = g * scale; dresidual = g
//           (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     sums: reads dy and x; dx: reads dy and x, writes dx and, where asked for, dresidual;
//           both read residual or, in its place, the mask of one bit an element, if forward had any
// Numerics  Products and trees of 16 in the accumulation type, added up in double. Where a sum
//           is not finite the chunk is gathered again in double. z has the forward's very bits.
#pragma once

#include "bits.h"
#include "elementwise.h"
#include "sums.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// g of a vector, for the piecewise linear activations or for the others. Two types, since loops
// with a call in them (`smooth_gradient`) keep no vector in a register.
template <typename T, bool kPiecewise>
struct PreActivationGradient {
  using V = VectorOf<T>;
  Activation act;
  V slope;
  const T* residual;    // or null
  const uint8_t* mask;  // or null

  explicit BNORM_INLINE PreActivationGradient(const BackwardParams& p)
      : act(p.act),
        slope(V::all(static_cast<Acc<T>>(p.slope))),
        residual(static_cast<const T*>(p.residual)),
        mask(p.mask) {}

  // d: x - mean
  template <typename P>
  BNORM_INLINE V operator()(V dy, V d, Place place, P part, V scale, V shift) const {
    if (kPiecewise && mask != nullptr) {
      return through_open(act, dy, lanes_of(V{}, read_bits(mask, place.bit)), slope);
    }
    V z = normalise(d, scale, shift);
    if (residual != nullptr) z = z + load(residual + place.at, part, V::all(0));
    if (kPiecewise) return through_piecewise(act, dy, z, slope);
    return through_smooth(act, dy, z);
  }
};

// f(PreActivationGradient) for the activation of this call.
template <typename T, typename F>
BNORM_INLINE void with_gradient(const BackwardParams& p, F f) {
  if (is_piecewise(p.act)) {
    f(PreActivationGradient<T, true>(p));
  } else {
    f(PreActivationGradient<T, false>(p));
  }
}

template <typename T>
void sums_in_double(const BackwardParams& p, const Span& span, int64_t c, Sums* out) {
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const double mean = static_cast<const Acc<T>*>(p.mean)[c];
  const double rstd = static_cast<const Acc<T>*>(p.rstd)[c];
  *out = {0, 0};
  const auto add = [&](double g, int64_t at) {
    out->dy += g;
    out->dy_xhat += g * ((value(x + at) - mean) * rstd);
  };
  if (p.act == Activation::Identity) {
    each_element(p.shape, span, c, [&](Place i) { add(value(dy + i.at), i.at); });
    return;
  }
  using V = VectorOf<T>;
  const V m = V::all(static_cast<const Acc<T>*>(p.mean)[c]);
  const V scale = V::all(static_cast<const Acc<T>*>(p.scale)[c]);
  const V shift = V::all(static_cast<const Acc<T>*>(p.shift)[c]);
  const Part one{1};
  with_gradient<T>(p, [&](auto gradient) {
    each_element(p.shape, span, c, [&](Place i) {
      const V g = load(dy + i.at, one, V::all(0)), d = load(x + i.at, one, m) - m;
      add(sum(gradient(g, d, i, one, scale, shift)), i.at);
    });
  });
}

// Channels [c0, c1), at most kChannelBlock of them.
template <typename T>
void sums(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1, Sums* out) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const A* rstd = static_cast<const A*>(p.rstd) + c0;
  const V zero = V::all(0);
  double sum_dy[kChannelBlock], dot[kChannelBlock];
  if (p.act == Activation::Identity) {
    const A* const coefficients[] = {static_cast<const A*>(p.mean) + c0};
    sums_of_pairs<T>(p.shape, span, c0, c1, coefficients, sum_dy, dot,
                     [=](Place place, auto part, const V(&k)[1]) BNORM_INLINE_LAMBDA {
                       return Pair<V>{load(dy + place.at, part, zero),
                                      load(x + place.at, part, k[0]) - k[0]};
                     });
  } else {
    const A* const coefficients[] = {static_cast<const A*>(p.mean) + c0,
                                     static_cast<const A*>(p.scale) + c0,
                                     static_cast<const A*>(p.shift) + c0};
    with_gradient<T>(p, [&](auto gradient) {
      sums_of_pairs<T>(p.shape, span, c0, c1, coefficients, sum_dy, dot,
                       [=](Place place, auto part, const V(&k)[3]) BNORM_INLINE_LAMBDA {
                         const V g = load(dy + place.at, part, zero),
                                 d = load(x + place.at, part, k[0]) - k[0];
                         return Pair<V>{gradient(g, d, place, part, k[1], k[2]), d};
                       });
    });
  }
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = {sum_dy[k], dot[k] * static_cast<double>(rstd[k])};
    if (!finite(out[k].dy) || !finite(out[k].dy_xhat)) {
      sums_in_double<T>(p, span, c0 + k, out + k);
    }
  }
}

// d: x - mean
template <typename V>
BNORM_INLINE V input_gradient(V g, V d, V rstd, V mean_g, V mean_g_xhat, V scale) {
  return ((g - mean_g) - (d * rstd) * mean_g_xhat) * scale;
}

template <typename T>
void dx(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const A* mean = static_cast<const A*>(p.mean);
  const A* rstd = static_cast<const A*>(p.rstd);
  const A* mean_g = static_cast<const A*>(p.mean_dy);
  const A* mean_g_xhat = static_cast<const A*>(p.mean_dy_xhat);
  const A* scale = static_cast<const A*>(p.scale);
  const V zero = V::all(0);
  const bool training = p.mean_dy != nullptr;
  const T* residual = static_cast<const T*>(p.residual);
  T* dresidual = static_cast<T*>(p.dresidual);
  const int64_t ahead = p.ahead;  // read once: the compiler must think that a store may change it
  if (p.act != Activation::Identity || dresidual != nullptr) {
    const A* const coefficients[] = {mean,
                                     rstd,
                                     scale,
                                     p.shift == nullptr ? scale : static_cast<const A*>(p.shift),
                                     training ? mean_g : scale,
                                     training ? mean_g_xhat : scale};
    with_gradient<T>(p, [&](auto gradient) {
      each_vector_of_span<NoBits>(
          p.shape, span, c0, c1, coefficients, dx != nullptr ? dx : dresidual, p.stream, nullptr,
          [=](Place place, auto part, auto how, const V(&k)[6], NoBits&) BNORM_INLINE_LAMBDA {
            const int64_t at = place.at;
            fetch_ahead(dy + at + ahead, how);
            fetch_ahead(x + at + ahead, how);
            if (residual != nullptr) fetch_ahead(residual + at + ahead, how);
            const V d = load(x + at, part, zero) - k[0];
            const V g = gradient(load(dy + at, part, zero), d, place, part, k[2], k[3]);
            if (dresidual != nullptr) store(dresidual + at, part, g, how);
            if (dx == nullptr) return;
            store(dx + at, part, training ? input_gradient(g, d, k[1], k[4], k[5], k[2]) : g * k[2],
                  how);
          });
    });
    return;
  }
  if (!training) {  // in inference dx does not depend on x, be it infinite
    const A* const coefficients[] = {scale};
    each_vector_of_span<NoBits>(p.shape, span, c0, c1, coefficients, dx, p.stream, nullptr,
                                [=](Place place, auto part, auto how, const V(&k)[1], NoBits&)
                                    BNORM_INLINE_LAMBDA {
                                      const int64_t at = place.at;
                                      store(dx + at, part, load(dy + at, part, zero) * k[0], how);
                                    });
    return;
  }
  const A* const coefficients[] = {mean, rstd, mean_g, mean_g_xhat, scale};
  each_vector_of_span<NoBits>(
      p.shape, span, c0, c1, coefficients, dx, p.stream, nullptr,
      [=](Place place, auto part, auto how, const V(&k)[5], NoBits&) BNORM_INLINE_LAMBDA {
        const int64_t at = place.at;
        fetch_ahead(dy + at + ahead, how);
        fetch_ahead(x + at + ahead, how);
        const V g = load(dy + at, part, zero), d = load(x + at, part, zero) - k[0];
        store(dx + at, part, input_gradient(g, d, k[1], k[2], k[3], k[4]), how);
      });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
