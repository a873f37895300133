// The arithmetic of backward, which the two-pass and the resident kernels share: the sums of g and
// g * (x - mean), what they mean for a channel, and writing dx and dresidual. g is the gradient of
// the activation's argument (epilogue.cuh).
#pragma once

#include "affine.cuh"
#include "channel.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "moments.cuh"
#include "params.h"
#include "tile_iterator.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// Vectors of each of the two tensors that are loaded at a time: so as many bytes are in flight as in
// forward.
constexpr int kHalf = kBatch / 2;

// A thread's sums of g and g * (x - mean), one pair per channel: over a run of at most kRun batches
// in the accumulation type, each vector added up on its own; the runs in double.
template <typename V>
struct GradientSums {
  using A = Acc<typename V::T>;
  using Vector = Values<typename V::T, V::kWidth>;
  static constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
  static constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector

  Pair sum[kChannels];

  // for_each(f, end_run) calls f(g, x, offset) for each vector, and end_run() after each run. Where
  // a sum is not finite, everything is summed again in double.
  template <typename Affines, typename ForEach>
  __device__ __forceinline__ void add_all(const Affines& affines, const ForEach& for_each) {
    A of_g[kChannels], of_dot[kChannels];
    const auto clear_run = [&] {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) of_g[k] = of_dot[k] = 0;
    };
    clear();
    clear_run();
    for_each(
        [&](const A(&g)[V::kWidth], const Vector& x, int64_t) {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) {
            A of_vector = g[k], dot = g[k] * (x[k] - affines.mean(k));
#pragma unroll
            for (int i = 1; i < kPerVector; ++i) {
              of_vector += g[i];
              dot = fma(g[i], x[i] - affines.mean(0), dot);
            }
            of_g[k] += of_vector;
            of_dot[k] += dot;
          }
        },
        [&] {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) {
            sum[k].a += of_g[k];
            sum[k].b += of_dot[k];
          }
          clear_run();
        });
    if (all_finite(sum)) return;
    clear();
    for_each(
        [&](const A(&g)[V::kWidth], const Vector& x, int64_t) {
#pragma unroll
          for (int v = 0; v < V::kWidth; ++v) {
            const int k = v % kChannels;
            const double wide_g = g[v];
            sum[k].a += wide_g;
            sum[k].b += wide_g * (static_cast<double>(x[v]) - affines.mean(k));
          }
        },
        [] {});
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
  }
};

// What the total of a channel's sums gives.
template <typename A>
struct ChannelGradients {
  MeanRstd<A> known;
  A sum_dy, sum_dy_xhat;    // dbias and dweight
  A mean_dy, mean_dy_xhat;  // of the sums as the caller sees them, that is after rounding to A

  template <typename Params>
  __device__ __forceinline__ ChannelGradients(const Params& p, int64_t c, const Pair& total)
      : known(p.statistics, c),
        sum_dy(static_cast<A>(total.a)),
        sum_dy_xhat(static_cast<A>(less_rest(total.b, known.rest, total.a) * known.rstd)) {
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

// The constants of dx of one channel, by the means of g and of g * xhat.
template <typename A>
struct Projection {
  A mean_dy = 0, proj_scale = 0;

  Projection() = default;
  __device__ __forceinline__ Projection(const MeanRstd<A>& known, A mean_g, A mean_g_xhat)
      : proj_scale(known.rstd * mean_g_xhat) {
    // x - mean - rest in dx: what the rest gives goes into the constant term.
    mean_dy = static_cast<A>(less_rest(mean_g, known.rest, proj_scale));
  }
  template <typename Table>
  __device__ __forceinline__ void set(const Table& table, int i) const {
    table.set(kMeanDy, i, mean_dy);
    table.set(kProjScale, i, proj_scale);
  }
};

// Sets the rows of TileTable that dx needs, by the total that thread i has of channel i of the tile, and if
// `writes` writes the sums that the caller asked for. Every thread must call: there is a barrier, after
// which every thread may read the table.
template <typename Table, typename Params>
__device__ __forceinline__ void set_gradients(const Table& table, const Params& p, int64_t tile,
                                              int channels, const Pair& total, bool writes) {
  using A = typename Table::A;
  const int t = static_cast<int>(threadIdx.x);
  const int64_t c = tile * channels + t;
  Projection<A> projection;  // read but not used beyond the last channel
  if (t < channels && c < p.shape.C) {
    const ChannelGradients<A> gradients(p, c, total);
    projection = {gradients.known, gradients.mean_dy, gradients.mean_dy_xhat};
    if (writes) gradients.write_sums(p, c);
  }
  if (t < channels) projection.set(table, t);
  __syncthreads();
}

// Calls f(g, x, offset) for each of the iterator's vectors, which it reads, and end_run() after each run.
// The mask's cursor is where the iterator is. kAhead: as TileIterator::pipelined. kLastTime: whether
// nobody reads dy and x after that.
template <typename V, bool kAhead, bool kLastTime, typename Params, typename Affines,
          typename Cursor, typename F, typename EndRun>
__device__ __forceinline__ void for_each_gradient(TileIterator<V::kWidth, V::kMapping> it,
                                                  const TilePlan& plan, const Params& p,
                                                  const Affines& affines, Cursor mask, F f,
                                                  EndRun end_run) {
  using T = typename V::T;
  using Vector = Values<T, V::kWidth>;
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  const EpilogueParams epilogue = epilogue_of<V>(p.epilogue);
  const T* residual = static_cast<const T*>(epilogue.residual);
  const bool masked = !V::kPlain && p.mask.bytes != nullptr;
  struct Loaded {
    Vector dy[kHalf], x[kHalf];
  };
#pragma unroll 1
  while (it.more()) {
    it.template pipelined<kHalf, kAhead, Loaded>(
        plan,
        [&](Loaded& loaded, const int64_t (&at)[kHalf], auto valid) {
#pragma unroll
          for (int u = 0; u < kHalf; ++u) {
            if (u >= valid) continue;
            loaded.dy[u].load(dy + at[u], /*evict_first=*/kLastTime);
            loaded.x[u].load(x + at[u], /*evict_first=*/kLastTime);
          }
        },
        [&](Loaded& loaded, const int64_t (&at)[kHalf], auto valid) {
          const unsigned mask_bits = masked ? mask.template read<kHalf>(valid) : 0;
#pragma unroll
          for (int u = 0; u < kHalf; ++u) {
            if (u >= valid) continue;
            Vector residual_vec;
            if (residual != nullptr) residual_vec.load(residual + at[u]);
            Acc<T> g[V::kWidth];
            epilogue_backward(epilogue, masked, mask_bits >> u * kByteBits, affines, loaded.dy[u],
                              loaded.x[u], residual_vec, g);
            f(g, loaded.x[u], at[u]);
          }
        },
        /*whole_warp=*/false, kRun * kBatch / kHalf);
    end_run();
  }
}

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

  // table: has all rows of TileTable. evict_first: as Values::store
  template <typename Params, typename Table>
  __device__ __forceinline__ GradientWriter(const Params& p, bool constant_statistics,
                                            bool evict_first, const Table& table)
      : dx_(static_cast<T*>(p.dx)),
        dresidual_(static_cast<T*>(p.dresidual)),
        constant_statistics_(constant_statistics),
        evict_first_(evict_first),
        mean_([&](int k) { return table.get(kMean, k); }),
        scale_([&](int k) { return table.get(kScale, k); }),
        mean_dy_([&](int k) { return table.get(kMeanDy, k); }),
        proj_scale_([&](int k) { return table.get(kProjScale, k); }) {}

  // The vectors at `offset`; x is not used where the statistics are constants.
  __device__ __forceinline__ void write(const A (&g)[V::kWidth], const Vector& x,
                                        int64_t offset) const {
    Vector rounded;
    if (dresidual_ != nullptr) {
      rounded.set(g);
      rounded.store(dresidual_ + offset, evict_first_);
    }
    if (dx_ == nullptr) return;
    A dx[V::kWidth];
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const int k = v % Iterator::kChannels;
      A d = g[v];
      if (!constant_statistics_) d = fma(mean_[k] - x[v], proj_scale_[k], d - mean_dy_[k]);
      dx[v] = d * scale_[k];
    }
    rounded.set(dx);
    rounded.store(dx_ + offset, evict_first_);
  }

 private:
  T* dx_;
  T* dresidual_;
  bool constant_statistics_, evict_first_;
  PerChannel<A, Iterator> mean_, scale_, mean_dy_, proj_scale_;
};

}  // namespace cuda
}  // namespace bnorm_ext
