// The forward kernels.
//
// Formula   moments: mean and m2 = sum((x - mean)^2) of a chunk;
//           apply: y = act(z), z = fma(x - mean, scale, shift) + residual, scale = weight * rstd,
//           shift = bias, corrected for the rounding of the mean (shift_of in params.h; Ioffe and
//           Szegedy 2015, arXiv:1502.03167)
// Bytes     moments: reads x; apply: reads x and, if given, residual; writes y and, if wanted, a
//           mask of one bit per element
// Numerics  Shifted sums in one pass: of d = x - anchor and of d * d, where the anchor is the mean
//           of a sample of the chunk. m2 = sum(d * d) - sum(d)^2 / n loses few digits as long as
//           the anchor is near the mean. Where it is not, the chunk is summed again about its mean.
//           Sums are trees of 4 or 16 values, accumulated in double. A chunk whose sums are not finite
//           is summed again in double: either its data is not finite, or float's range was exceeded
//           although the result fits.
#pragma once

#include "elementwise.h"
#include "epilogue.h"
#include "sums.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// The moments of channel c of a chunk, in double throughout.
template <typename T>
void moments_in_double(const T* x, const Shape& shape, const Span& span, int64_t c, Moments* out) {
  double total = 0, m2 = 0;
  for_each_element(shape, span, c, [&](Offset at) { total += value(x + at.element); });
  const double mean = total / static_cast<double>(span.count());
  for_each_element(shape, span, c, [&](Offset at) {
    const double d = value(x + at.element) - mean;
    m2 += d * d;
  });
  *out = {mean, 0, m2};
}

// The squared distance of anchor and mean, in variances, up to which the sums are used. The mean of
// 16 independent values exceeds it in a millionth of cases.
constexpr double kFar = 1.5;

// anchor[c - c0]: the mean of a sample of the channel, distributed over the span. By rows, the
// sample has eight vectors; by columns, 4 to 16 rows, with 16 values if there are as many.
template <typename T>
BNORM_INLINE void sample_means(const T* x, const Shape& shape, const Span& span, int64_t c0,
                               int64_t c1, Acc<T>* anchor) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<A> zeros[1];
    Columns<double> columns;
    const int64_t joined = samples_per_summed_row(shape);
    for_each_tile(shape, span, c0, c1, joined, [&](Tile tile) {
      for (int64_t j = 0; j < tile.width + V::W; ++j) zeros[0].a[j] = 0;
      const int64_t per_row = tile.samples_per_row(shape.S) * shape.S;
      const int64_t wanted = per_row >= 4 ? 4 : per_row >= 2 ? 8 : 16;
      if (tile.rows > 0) tile.rest = 0;
      if (tile.rows > wanted) tile.stride *= tile.rows / wanted, tile.rows = wanted;
      const int64_t values = tile.rows > 0 ? tile.rows * per_row : tile.rest / shape.C;
      sum_columns<V>(
          tile, sizeof(T), zeros, columns.a, nullptr,
          [=](Offset at, auto part, const V(&zero)[1])
              BNORM_INLINE_LAMBDA { return Pair<V>{load(x + at.element, part, zero[0]), zero[0]}; },
          [](int64_t) BNORM_INLINE_LAMBDA {});
      double sums[kColumns];
      sum_by_channel<V>(tile, shape.S, columns.a, sums);
      for (int64_t c = tile.c0; c < tile.c1; ++c) {
        anchor[c - c0] = static_cast<A>(sums[c - tile.c0] / static_cast<double>(values));
      }
    });
    return;
  }
  constexpr int kSample = 8;  // vectors
  const int64_t length = span.s1 - span.s0, width = min(V::W, length);
  for (int64_t c = c0; c < c1; ++c) {
    const Pair<V> sums = tree_sums<kSample>(0, [&](int i) {
      const int64_t position = i * span.count() / kSample;
      const int64_t s = min(position % length, length - width);
      const T* p = x + ((span.n0 + position / length) * shape.C + c) * shape.S + span.s0 + s;
      return Pair<V>{load(p, Part{width}, V::all(0)), V::all(0)};
    });
    anchor[c - c0] = static_cast<A>(sum(sums.a) / static_cast<double>(kSample * width));
  }
}

// The moments of n values from the sums d of (x - anchor) and d2 of its square; per_value = 1 / n.
BNORM_INLINE Moments moments_of(double anchor, double d, double d2, double per_value) {
  const double delta = d * per_value, m2 = d2 - d * delta;
  return {anchor, delta, m2 < 0 ? 0 : m2};
}

// Channels [c0, c1), at most kMaxChannelsPerCall of them.
template <typename T>
void moments(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1, Moments* out) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* x = static_cast<const T*>(p.x);
  const double per_value = 1.0 / static_cast<double>(span.count());
  A anchor[kMaxChannelsPerCall];
  double d[kMaxChannelsPerCall], d2[kMaxChannelsPerCall];
  sample_means(x, p.shape, span, c0, c1, anchor);

  const A* const coefficients[] = {anchor};
  const auto sum_about_anchor = [&] {
    sums_of_pairs<T>(
        p.shape, span, c0, c1, coefficients, d, d2,
        [=](Offset at, auto part, const V(&k)[1]) BNORM_INLINE_LAMBDA {
          const V deviation = load(x + at.element, part, k[0]) - k[0];
          return Pair<V>{deviation, deviation};
        },
        [=](int64_t i) BNORM_INLINE_LAMBDA { prefetch(x + i); });
  };
  sum_about_anchor();
  // All channels are converted, and the good ones only counted: a loop without a branch.
  int64_t good = 0;
  const auto is_good = [&](int64_t k) {
    const double m2 = moments_of(0, d[k], d2[k], per_value).m2;
    return is_finite(m2) && d[k] * (d[k] * per_value) <= kFar * m2;
  };
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = moments_of(anchor[k], d[k], d2[k], per_value);
    good += is_good(k) ? 1 : 0;
  }
  if (good == c1 - c0) return;

  for (int64_t k = 0; k < c1 - c0; ++k) anchor[k] = static_cast<A>(out[k].anchor + out[k].delta);
  bool bad[kMaxChannelsPerCall];
  for (int64_t k = 0; k < c1 - c0; ++k) bad[k] = !is_good(k);
  sum_about_anchor();
  for (int64_t k = 0; k < c1 - c0; ++k) {
    if (!bad[k]) continue;
    out[k] = moments_of(anchor[k], d[k], d2[k], per_value);
    if (!is_finite(out[k].m2)) moments_in_double(x, p.shape, span, c0 + k, out + k);
  }
}

template <typename T>
void apply(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const A* const coefficients[] = {static_cast<const A*>(p.mean), static_cast<const A*>(p.scale),
                                   static_cast<const A*>(p.shift)};
  // Local copies: for all that the compiler knows, a store to y could change a member of p.
  const int64_t prefetch_distance = p.prefetch_distance;
  const V zero = V::all(0);
  if (p.act == Activation::Identity && p.residual == nullptr) {
    for_each_vector_of_span<NoMask>(p.shape, span, c0, c1, coefficients, y, p.nontemporal, nullptr,
                                    [=](Offset at, auto part, auto hint, const V(&k)[3], NoMask&)
                                        BNORM_INLINE_LAMBDA {
                                          const int64_t i = at.element;
                                          prefetch(x + i + prefetch_distance, hint);
                                          const V d = load(x + i, part, zero) - k[0];
                                          store(y + i, part, normalise(d, k[1], k[2]), hint);
                                        });
    return;
  }
  const T* residual = static_cast<const T*>(p.residual);
  const Activation act = p.act;
  const V slope = V::all(static_cast<A>(p.slope));
  if (p.mask != nullptr) {  // only with a residual and a piecewise linear activation
    for_each_vector_of_span<MaskWriter>(
        p.shape, span, c0, c1, coefficients, y, p.nontemporal, p.mask,
        [=](Offset at, auto part, auto hint, const V(&k)[3], MaskWriter& mask) BNORM_INLINE_LAMBDA {
          const int64_t i = at.element;
          prefetch(x + i + prefetch_distance, hint);
          prefetch(residual + i + prefetch_distance, hint);
          const V z = normalise(load(x + i, part, zero) - k[0], k[1], k[2]) +
                      load(residual + i, part, zero);
          const auto passes = passes_gradient(act, z);
          mask.put(movemask(passes), part, V::W);
          store(y + i, part, activate_piecewise(act, z, passes, slope), hint);
        });
    return;
  }
  for_each_vector_of_span<NoMask>(p.shape, span, c0, c1, coefficients, y, p.nontemporal, nullptr,
                                  [=](Offset at, auto part, auto hint, const V(&k)[3], NoMask&)
                                      BNORM_INLINE_LAMBDA {
                                        const int64_t i = at.element;
                                        prefetch(x + i + prefetch_distance, hint);
                                        V z = normalise(load(x + i, part, zero) - k[0], k[1], k[2]);
                                        if (residual != nullptr) {
                                          prefetch(residual + i + prefetch_distance, hint);
                                          z = z + load(residual + i, part, zero);
                                        }
                                        store(y + i, part, activate(act, z, slope), hint);
                                      });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
