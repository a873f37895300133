// The arithmetic of backward, which the two-pass and the resident kernels share: the sums of g and
// g * (x - mean), what they mean for a channel, and writing dx and dresidual. g is the gradient of
// the activation's argument (epilogue.cuh).
#pragma once

#include "affine.cuh"
#include "channel.cuh"
#include "params.h"
#include "tile_iterator.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// A thread's sums of g and g * (x - mean), one pair per channel. Four values at a time are summed
// in the accumulation type; these partial sums are added in double.
template <typename V>
struct GradientSums {
  using A = Acc<typename V::T>;
  using Vector = Values<typename V::T, V::kWidth>;
  static constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
  static constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
  static_assert(kBatch * kPerVector % 4 == 0, "a full batch leaves no partial sum");

  Pair sum[kChannels];
  A g_of_4[kChannels], dot_of_4[kChannels];  // the partial sums

  // for_each(f, end_batch) calls f(u, g, x, offset) for each vector, u being its number in the
  // batch, and end_batch(valid) after each batch. Where a sum is not finite, everything is summed
  // again in double: either the data is not finite, or float overflowed although the result fits.
  template <typename Affines, typename ForEach>
  __device__ __forceinline__ void add_all(const Affines& affines, const ForEach& for_each) {
    clear();
    for_each(
        [&](int u, const A(&g)[V::kWidth], const Vector& x, int64_t) { add(affines, u, g, x); },
        [&](int valid) {
          if (valid == kBatch) return;
#pragma unroll
          for (int k = 0; k < kChannels; ++k) flush(k);
        });
    if (finite()) return;
    clear();
    for_each([&](int, const A(&g)[V::kWidth], const Vector& x,
                 int64_t) { add_in_double(affines, g, x); },
             [](int) {});
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      sum[k] = {0, 0};
      g_of_4[k] = dot_of_4[k] = 0;
    }
  }
  template <typename Affines>
  __device__ __forceinline__ void add(const Affines& affines, int u, const A (&g)[V::kWidth],
                                      const Vector& x) {
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const int k = v % kChannels;
      g_of_4[k] += g[v];
      dot_of_4[k] = fma(g[v], x[v] - affines[k].mean, dot_of_4[k]);
      if ((u * kPerVector + v / kChannels) % 4 == 3) flush(k);
    }
  }
  __device__ __forceinline__ void flush(int k) {
    sum[k].a += g_of_4[k];
    sum[k].b += dot_of_4[k];
    g_of_4[k] = dot_of_4[k] = 0;
  }
  __device__ __forceinline__ bool finite() const {
    bool all = true;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      all = all && is_finite(sum[k].a) && is_finite(sum[k].b);
    }
    return all;
  }
  template <typename Affines>
  __device__ __forceinline__ void add_in_double(const Affines& affines, const A (&g)[V::kWidth],
                                                const Vector& x) {
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const int k = v % kChannels;
      const double wide_g = g[v];
      sum[k].a += wide_g;
      sum[k].b += wide_g * (static_cast<double>(x[v]) - affines[k].mean);
    }
  }
};

// What the total of a channel's sums gives.
template <typename A>
struct ChannelGradients {
  A rstd;
  A sum_dy, sum_dy_xhat;    // dbias and dweight
  A mean_dy, mean_dy_xhat;  // of the sums as the caller sees them, that is after rounding to A

  template <typename Params>
  __device__ __forceinline__ ChannelGradients(const Params& p, int64_t c, const Pair& total)
      : rstd(MeanRstd<A>(p.statistics, c).rstd),
        sum_dy(static_cast<A>(total.a)),
        sum_dy_xhat(static_cast<A>(total.b * rstd)) {
    const double n = static_cast<double>(p.shape.N * p.shape.S);
    mean_dy = static_cast<A>(sum_dy / n);
    mean_dy_xhat = static_cast<A>(sum_dy_xhat / n);
  }
  // Writes the sums that the caller asked for.
  template <typename Params>
  __device__ __forceinline__ void write_sums(const Params& p, int64_t c) const {
    if (p.sum_dy.data != nullptr) set(p.sum_dy, c, sum_dy);
    if (p.sum_dy_xhat.data != nullptr) set(p.sum_dy_xhat, c, sum_dy_xhat);
  }
};

// Writes dx and dresidual, those that are asked for:
//   dresidual = g
//   dx = ((g - mean_dy) - (x - mean) * proj_scale) * scale, proj_scale = rstd * mean_dy_xhat;
//   where the statistics are constants dx = g * scale
template <typename V>
class GradientWriter {
 public:
  using T = typename V::T;
  using A = Acc<T>;
  using Vector = Values<T, V::kWidth>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;

  // mean_dy(k), proj_scale(k): of channel it.channel_of(k). evict_first: as Values::store
  template <typename Params, typename MeanDy, typename ProjScale>
  __device__ __forceinline__ GradientWriter(const Params& p, bool constant_statistics,
                                            bool evict_first, const Iterator& it, MeanDy mean_dy,
                                            ProjScale proj_scale)
      : dx_(static_cast<T*>(p.dx)),
        dresidual_(static_cast<T*>(p.dresidual)),
        constant_statistics_(constant_statistics),
        evict_first_(evict_first),
        mean_dy_(it.split_of_vector(), mean_dy),
        proj_scale_(it.split_of_vector(), proj_scale) {}

  // The vectors at `offset`; x is not used where the statistics are constants.
  template <typename Affines>
  __device__ __forceinline__ void write(const Affines& affines, const A (&g)[V::kWidth],
                                        const Vector& x, int64_t offset) const {
    Vector rounded;
    if (dresidual_ != nullptr) {
#pragma unroll
      for (int v = 0; v < V::kWidth; ++v) rounded.set(v, g[v]);
      rounded.store(dresidual_ + offset, evict_first_);
    }
    if (dx_ == nullptr) return;
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const int k = v % Iterator::kChannels;
      A d = g[v];
      if (!constant_statistics_) {
        d = (d - mean_dy_[k]) - (x[v] - affines[k].mean) * proj_scale_[k];
      }
      rounded.set(v, d * affines[k].scale);
    }
    rounded.store(dx_ + offset, evict_first_);
  }

 private:
  T* dx_;
  T* dresidual_;
  bool constant_statistics_, evict_first_;
  PerChannel<A, Iterator> mean_dy_, proj_scale_;
};

}  // namespace cuda
}  // namespace bnorm_ext
