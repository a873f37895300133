// The backward kernels.
//
// Formula   With xhat = (x - mean) * rstd and g = dy * act'(z), the gradient of
//           z = fma(x - mean, scale, shift) + residual, scale = weight * rstd:
//           sums: of g and of g * xhat over a chunk;
//           dx: dx = ((g - mean_g) - xhat * mean_g_xhat) * scale, dresidual = g; in inference,
//           where the statistics are constants, dx = g * scale. What rounding has left out of the
//           mean is in shift and in mean_g (cpu/backend.cpp; less_rest in params.h)
//           (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     sums: reads dy and x; dx: reads dy and x, writes dx and, if wanted, dresidual. Both
//           read the residual, if there is one, or the mask of one bit per element in its place.
// Numerics  Products and trees of 4 or 16 values in the accumulation type, added up in double. Where
//           a sum is not finite, the chunk is summed again in double. z has the same bits as in
//           forward.
#pragma once

#include "elementwise.h"
#include "epilogue.h"
#include "sums.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// The sums of channel c of a chunk; products and additions are in double, g as in the vectors.
template <typename T>
void sums_in_double(const BackwardParams& p, const Span& span, int64_t c, Sums* out) {
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const double mean = static_cast<const Acc<T>*>(p.mean)[c];
  const double rstd = static_cast<const Acc<T>*>(p.rstd)[c];
  *out = {0, 0};
  const auto add = [&](double g, int64_t i) {
    out->dy += g;
    out->dy_xhat += g * ((value(x + i) - mean) * rstd);
  };
  if (p.act == Activation::Identity) {
    for_each_element(p.shape, span, c, [&](Offset at) { add(value(dy + at.element), at.element); });
    return;
  }
  using V = VectorOf<T>;
  const V m = V::all(static_cast<const Acc<T>*>(p.mean)[c]);
  const V scale = V::all(static_cast<const Acc<T>*>(p.scale)[c]);
  const V shift = V::all(static_cast<const Acc<T>*>(p.shift)[c]);
  const Part one{1};
  with_epilogue_backward<T>(p, [&](auto epilogue_backward) {
    for_each_element(p.shape, span, c, [&](Offset at) {
      const int64_t i = at.element;
      const V dy_vec = load(dy + i, one, V::all(0)), d = load(x + i, one, m) - m;
      double lanes[V::W] = {};
      add_to(lanes, epilogue_backward(dy_vec, d, at, one, scale, shift));
      add(lanes[0], i);  // the other lanes may be NaN: with a slope of infinity, for one
    });
  });
}

// Channels [c0, c1), at most kMaxChannelsPerCall of them.
template <typename T>
void sums(const BackwardParams& p, const Span& span, int64_t c0, int64_t c1, Sums* out) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const A* rstd = static_cast<const A*>(p.rstd) + c0;
  const V zero = V::all(0);
  double sum_dy[kMaxChannelsPerCall], dot[kMaxChannelsPerCall];
  const T* residual = p.mask == nullptr ? static_cast<const T*>(p.residual) : nullptr;
  const auto ahead = [=](int64_t i) BNORM_INLINE_LAMBDA {
    prefetch(dy + i);
    prefetch(x + i);
    if (residual != nullptr) prefetch(residual + i);
  };
  if (p.act == Activation::Identity) {
    const A* const coefficients[] = {static_cast<const A*>(p.mean) + c0};
    sums_of_pairs<T>(
        p.shape, span, c0, c1, coefficients, sum_dy, dot,
        [=](Offset at, auto part, const V(&k)[1]) BNORM_INLINE_LAMBDA {
          return Pair<V>{load(dy + at.element, part, zero),
                         load(x + at.element, part, k[0]) - k[0]};
        },
        ahead);
  } else {
    const A* const coefficients[] = {static_cast<const A*>(p.mean) + c0,
                                     static_cast<const A*>(p.scale) + c0,
                                     static_cast<const A*>(p.shift) + c0};
    const auto add = [&](auto epilogue_backward) {
      sums_of_pairs<T>(
          p.shape, span, c0, c1, coefficients, sum_dy, dot,
          [=](Offset at, auto part, const V(&k)[3]) BNORM_INLINE_LAMBDA {
            const V dy_vec = load(dy + at.element, part, zero),
                    d = load(x + at.element, part, k[0]) - k[0];
            return Pair<V>{epilogue_backward(dy_vec, d, at, part, k[1], k[2]), d};
          },
          ahead);
    };
    if (!with_relu_of_input<T>(p, add)) with_epilogue_backward<T>(p, add);
  }
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = {sum_dy[k], dot[k] * static_cast<double>(rstd[k])};
    if (!is_finite(out[k].dy) || !is_finite(out[k].dy_xhat)) {
      sums_in_double<T>(p, span, c0 + k, out + k);
    }
  }
}

// deviation: x - mean
template <typename V>
BNORM_INLINE V input_gradient(V g, V deviation, V rstd, V mean_g, V mean_g_xhat, V scale) {
  return ((g - mean_g) - (deviation * rstd) * mean_g_xhat) * scale;
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
  // Local copies: for all that the compiler knows, a store to dx could change a member of p.
  const int64_t prefetch_distance = p.prefetch_distance;
  if (p.act != Activation::Identity || dresidual != nullptr) {
    const A* const coefficients[] = {mean,
                                     rstd,
                                     scale,
                                     p.shift == nullptr ? scale : static_cast<const A*>(p.shift),
                                     training ? mean_g : scale,
                                     training ? mean_g_xhat : scale};
    const auto write = [&](auto epilogue_backward) {
      using Epilogue = decltype(epilogue_backward);
      constexpr bool kOnlyDx = Epilogue::kFromInput, kBoth = Epilogue::kFromMask;
      constexpr bool kAny = !kOnlyDx && !kBoth;
      for_each_vector_of_span<NoMask>(
          p.shape, span, c0, c1, coefficients, dx != nullptr ? dx : dresidual, p.nontemporal,
          nullptr,
          [=](Offset at, auto part, auto hint, const V(&k)[6], NoMask&) BNORM_INLINE_LAMBDA {
            const int64_t i = at.element;
            prefetch(dy + i + prefetch_distance, hint);
            prefetch(x + i + prefetch_distance, hint);
            if (kAny && residual != nullptr) prefetch(residual + i + prefetch_distance, hint);
            const V d = load(x + i, part, zero) - k[0];
            const V g = epilogue_backward(load(dy + i, part, zero), d, at, part, k[2], k[3]);
            if (kBoth || (kAny && dresidual != nullptr)) store(dresidual + i, part, g, hint);
            if (kAny && dx == nullptr) return;
            const bool all_terms = !kAny || training;
            store(dx + i, part, all_terms ? input_gradient(g, d, k[1], k[4], k[5], k[2]) : g * k[2],
                  hint);
          });
    };
    const bool writes_dx = training && dx != nullptr;
    if (writes_dx && dresidual == nullptr && with_relu_of_input<T>(p, write)) return;
    if (writes_dx && dresidual != nullptr && with_mask_of_sum<T>(p, write)) return;
    with_epilogue_backward<T>(p, write);
    return;
  }
  if (!training) {  // x is not read: an infinite one must not reach dx
    const A* const coefficients[] = {scale};
    for_each_vector_of_span<NoMask>(
        p.shape, span, c0, c1, coefficients, dx, p.nontemporal, nullptr,
        [=](Offset at, auto part, auto hint, const V(&k)[1], NoMask&) BNORM_INLINE_LAMBDA {
          const int64_t i = at.element;
          store(dx + i, part, load(dy + i, part, zero) * k[0], hint);
        });
    return;
  }
  const A* const coefficients[] = {mean, rstd, mean_g, mean_g_xhat, scale};
  for_each_vector_of_span<NoMask>(
      p.shape, span, c0, c1, coefficients, dx, p.nontemporal, nullptr,
      [=](Offset at, auto part, auto hint, const V(&k)[5], NoMask&) BNORM_INLINE_LAMBDA {
        const int64_t i = at.element;
        prefetch(dy + i + prefetch_distance, hint);
        prefetch(x + i + prefetch_distance, hint);
        const V g = load(dy + i, part, zero), d = load(x + i, part, zero) - k[0];
        store(dx + i, part, input_gradient(g, d, k[1], k[2], k[3], k[4]), hint);
      });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
