// The forward kernels.
//
// Formula   mean and m2 = sum((x - mean)^2) of a chunk; y = act(z) with
//           z = fma(x - mean, scale, shift) + residual, scale = weight * rstd, shift = bias
//           (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Bytes     moments: reads x; apply: reads x and, where given, residual; writes y and, where asked
//           for, one bit an element
// Numerics  Sums of d = x - about and d * d, where `about` is the mean of a sample of the chunk:
//           m2 = sum(d * d) - sum(d)^2 / n loses no digits to speak of as long as that is near the
//           mean, and the chunk is taken again about its mean where it is not. Sums are trees of
//           16 values, added up in double. Where one is not finite
//           the chunk is gathered again in double: then either the data is not finite, or
//           float's range was exceeded although the result fits.
#pragma once

#include "bits.h"
#include "elementwise.h"
#include "sums.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Channel c of the chunk once more, in double throughout.
template <typename T>
void moments_in_double(const T* x, const Shape& shape, const Span& span, int64_t c, Moments* out) {
  double total = 0, m2 = 0;
  each_element(shape, span, c, [&](Place i) { total += value(x + i.at); });
  const double mean = total / static_cast<double>(span.count());
  each_element(shape, span, c, [&](Place i) {
    const double d = value(x + i.at) - mean;
    m2 += d * d;
  });
  *out = {mean, 0, m2};
}

// Of independent values, the mean of 16 is within kFar of the mean in all but a millionth of cases.
constexpr double kFar = 1.5;  // variances

// about[c - c0]: the mean of a sample of the channel, spread over the span. Eight vectors of the
// channel where rows are long; where they are short, 4 to 16 rows with 64 values if they have them.
template <typename T>
BNORM_INLINE void sample_means(const T* x, const Shape& shape, const Span& span, int64_t c0,
                               int64_t c1, Acc<T>* about) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  if (is_short(shape)) {
    Columns<A> zeros[1];
    Columns<double> columns;
    each_tile(shape, span, c0, c1, [&](Tile tile) {
      for (int64_t j = 0; j < tile.width + V::W; ++j) zeros[0].a[j] = 0;
      const int64_t per_row = tile.copies(shape.S) * shape.S;
      const int64_t wanted = per_row >= 16 ? 4 : per_row >= 8 ? 8 : 16;
      if (tile.rows > 0) tile.rest = 0;
      if (tile.rows > wanted) tile.stride *= tile.rows / wanted, tile.rows = wanted;
      const int64_t values = tile.rows > 0 ? tile.rows * per_row : tile.rest / shape.C;
      sum_columns<V>(tile, sizeof(T), zeros, columns.a, nullptr,
                     [=](Place place, auto part, const V(&zero)[1]) BNORM_INLINE_LAMBDA {
                       return Pair<V>{load(x + place.at, part, zero[0]), zero[0]};
                     });
      double sums[kColumns];
      gather<V>(tile, shape.S, columns.a, sums);
      for (int64_t c = tile.c0; c < tile.c1; ++c) {
        about[c - c0] = static_cast<A>(sums[c - tile.c0] / static_cast<double>(values));
      }
    });
    return;
  }
  constexpr int kSample = 8;
  const int64_t length = span.s1 - span.s0, width = smaller(V::W, length);
  for (int64_t c = c0; c < c1; ++c) {
    const Pair<V> sums = tree<kSample>(0, [&](int i) {
      const int64_t position = i * span.count() / kSample;
      const int64_t s = smaller(position % length, length - width);
      const T* p = x + ((span.n0 + position / length) * shape.C + c) * shape.S + span.s0 + s;
      return Pair<V>{load(p, Part{width}, V::all(0)), V::all(0)};
    });
    about[c - c0] = static_cast<A>(sum(sums.a) / static_cast<double>(kSample * width));
  }
}

// Values with sums d and d2 of (x - shift) and its square; per_value: one over how many.
BNORM_INLINE Moments moments_about(double shift, double d, double d2, double per_value) {
  const double delta = d * per_value, m2 = d2 - d * delta;
  return {shift, delta, m2 < 0 ? 0 : m2};
}

// Channels [c0, c1), at most kChannelBlock of them.
template <typename T>
void moments(const ForwardParams& p, const Span& span, int64_t c0, int64_t c1, Moments* out) {
  using A = Acc<T>;
  using V = VectorOf<T>;
  const T* x = static_cast<const T*>(p.x);
  const double per_value = 1.0 / static_cast<double>(span.count());
  A about[kChannelBlock];
  double d[kChannelBlock], d2[kChannelBlock];
  sample_means(x, p.shape, span, c0, c1, about);

  const A* const coefficients[] = {about};
  const auto gather = [&] {
    sums_of_pairs<T>(p.shape, span, c0, c1, coefficients, d, d2,
                     [=](Place place, auto part, const V(&k)[1]) BNORM_INLINE_LAMBDA {
                       const V deviation = load(x + place.at, part, k[0]) - k[0];
                       return Pair<V>{deviation, deviation};
                     });
  };
  gather();
  // Not yet whether they are any good: so this is a loop without a branch.
  int64_t good = 0;
  const auto is_good = [&](int64_t k) {
    const double m2 = moments_about(0, d[k], d2[k], per_value).m2;
    return finite(m2) && d[k] * (d[k] * per_value) <= kFar * m2;
  };
  for (int64_t k = 0; k < c1 - c0; ++k) {
    out[k] = moments_about(about[k], d[k], d2[k], per_value);
    good += is_good(k) ? 1 : 0;
  }
  if (good == c1 - c0) return;

  for (int64_t k = 0; k < c1 - c0; ++k) about[k] = static_cast<A>(out[k].shift + out[k].delta);
  bool bad[kChannelBlock];
  for (int64_t k = 0; k < c1 - c0; ++k) bad[k] = !is_good(k);
  gather();
  for (int64_t k = 0; k < c1 - c0; ++k) {
    if (!bad[k]) continue;
    out[k] = moments_about(about[k], d[k], d2[k], per_value);
    if (!finite(out[k].m2)) moments_in_double(x, p.shape, span, c0 + k, out + k);
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
  const int64_t ahead = p.ahead;  // read once: the compiler must think that a store may change it
  const V zero = V::all(0);
  if (p.act == Activation::Identity && p.residual == nullptr) {
    each_vector_of_span<NoBits>(p.shape, span, c0, c1, coefficients, y, p.stream, nullptr,
                                [=](Place place, auto part, auto how, const V(&k)[3], NoBits&)
                                    BNORM_INLINE_LAMBDA {
                                      const int64_t at = place.at;
                                      fetch_ahead(x + at + ahead, how);
                                      const V d = load(x + at, part, zero) - k[0];
                                      store(y + at, part, normalise(d, k[1], k[2]), how);
                                    });
    return;
  }
  const T* residual = static_cast<const T*>(p.residual);
  const Activation act = p.act;
  const V slope = V::all(static_cast<A>(p.slope));
  if (p.mask != nullptr) {  // after an addition, and piecewise linear
    each_vector_of_span<BitWriter>(
        p.shape, span, c0, c1, coefficients, y, p.stream, p.mask,
        [=](Place place, auto part, auto how, const V(&k)[3], BitWriter& bits) BNORM_INLINE_LAMBDA {
          const int64_t at = place.at;
          fetch_ahead(x + at + ahead, how);
          fetch_ahead(residual + at + ahead, how);
          const V z = normalise(load(x + at, part, zero) - k[0], k[1], k[2]) +
                      load(residual + at, part, zero);
          const auto open = is_open(act, z);
          bits.put(bits_of(open), part, V::W);
          store(y + at, part, activate_open(act, z, open, slope), how);
        });
    return;
  }
  each_vector_of_span<NoBits>(p.shape, span, c0, c1, coefficients, y, p.stream, nullptr,
                              [=](Place place, auto part, auto how, const V(&k)[3], NoBits&)
                                  BNORM_INLINE_LAMBDA {
                                    const int64_t at = place.at;
                                    fetch_ahead(x + at + ahead, how);
                                    V z = normalise(load(x + at, part, zero) - k[0], k[1], k[2]);
                                    if (residual != nullptr) {
                                      fetch_ahead(residual + at + ahead, how);
                                      z = z + load(residual + at, part, zero);
                                    }
                                    store(y + at, part, activate(act, z, slope), how);
                                  });
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
