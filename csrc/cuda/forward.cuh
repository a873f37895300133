// What the kernels of forward do with the vectors that an iterator has: adding them up, and writing y.
#pragma once

#include "affine.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "moments.cuh"
#include "params.h"
#include "reduce.cuh"
#include "tile_iterator.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// Adds the iterator's vectors of x to `sum`, as deviations from about(k) and their squares.
template <typename V, typename About>
__device__ __forceinline__ void add_moments(TileIterator<V::kWidth, V::kMapping> it,
                                            const TilePlan& plan, const typename V::T* x,
                                            About about, Pair (&sum)[MomentSums<V>::kChannels]) {
  struct Loaded {
    Values<typename V::T, V::kWidth> batch[kBatch];
  };
#pragma unroll 1
  while (it.more()) {
    MomentSums<V> run;
    it.template pipelined<kBatch, true, Loaded>(
        plan,
        [&](Loaded& loaded, const int64_t (&at)[kBatch], auto valid) {
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (u < valid) loaded.batch[u].load(x + at[u]);
          }
        },
        [&](Loaded& loaded, const int64_t (&)[kBatch], auto valid) {
          if (run.is_empty()) {
            run.begin(loaded.batch, valid);
            run.add(loaded.batch, valid);
          } else {
            run.add(loaded.batch, valid);
          }
        },
        /*whole_warp=*/false, kRun);
    run.end(sum, about);
  }
}

// The same in double, vector by vector.
template <typename V, typename About>
__device__ __forceinline__ void add_moments_in_double(TileIterator<V::kWidth, V::kMapping> it,
                                                      const TilePlan& plan, const typename V::T* x,
                                                      About about,
                                                      Pair (&sum)[MomentSums<V>::kChannels]) {
#pragma unroll 1
  for (; it.more(); it.advance(plan)) {
    Values<typename V::T, V::kWidth> vector;
    vector.load(x + it.offset);
    add_in_double<V>(vector, about, sum);
  }
}

// The statistics of a channel of a batch, and the constants of z by them.
template <typename A>
struct BatchStatistics {
  double mean = 0, var = 0;
  A rest = 0, rstd = 0;  // rest: of the mean
  Affine<A> affine = {};

  BatchStatistics() = default;
  // total: the sums of the deviations from `anchor` and of their squares
  __device__ __forceinline__ BatchStatistics(const ResidentForwardParams& p, const Pair& total,
                                             double anchor, A weight, A bias)
      : mean(anchor + total.a * p.per_value),
        var(variance_of(total, p.per_value)),
        rstd(rstd_of<A>(var, p.eps)) {
    const auto split = split_mean<A>(anchor, total.a * p.per_value);
    rest = split.rest;
    affine.mean = split.mean;
    affine.scale = weight * rstd;
    affine.shift = shift_of(bias, rest, affine.scale);
  }
  __device__ __forceinline__ void write(const ResidentForwardParams& p, int64_t c) const {
    store_mean<A>(p.mean, p.shape.C, c, {affine.mean, rest});
    store_one(static_cast<A*>(p.rstd) + c, rstd);
    update_running(p.running, c, mean, var, static_cast<double>(p.shape.N * p.shape.S));
  }
};

// Increments num_batches_tracked once, after the running statistics of all tiles were updated. For one
// block of each tile, whose threads must all call.
__device__ __forceinline__ void count_batch(const ResidentForwardParams& p, int64_t tile) {
  if (p.running.num_batches_tracked == nullptr) return;
  const bool is_last =
      p.tiles_done == nullptr ? tile == 0 : last_to_arrive(p.tiles_done, p.plan.tile_plan.tiles);
  if (is_last && threadIdx.x == 0) ++*p.running.num_batches_tracked;
}

// Reads the iterator's vectors of x and of the residual for the last time, and writes y and, if `masked`, the mask,
// whose cursor is where the iterator is; y evict_first as Values::store.
template <typename V, typename Affines, typename Cursor>
__device__ __forceinline__ void write_y(TileIterator<V::kWidth, V::kMapping> it,
                                        const TilePlan& plan, const typename V::T* x,
                                        typename V::T* y, const EpilogueParams& epilogue,
                                        const Affines& affines, Cursor mask, bool masked,
                                        bool evict_first) {
  // The compiler sees early that there is no mask without an epilogue, and spills no registers.
  const bool writes_mask = !V::kPlain && masked;
  using Vector = Values<typename V::T, V::kWidth>;
  const auto* residual = static_cast<const typename V::T*>(epilogue.residual);
  struct Loaded {
    Vector batch[kBatch], residual[kBatch];  // batch: x, then y
  };
  // Lanes share the bytes of a mask: then all lanes of a warp iterate equally often.
  it.template pipelined<kBatch, true, Loaded>(
      plan,
      [&](Loaded& loaded, const int64_t (&at)[kBatch], auto valid) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (u >= valid) continue;
          loaded.batch[u].load(x + at[u], /*evict_first=*/true);
          if (residual != nullptr) loaded.residual[u].load(residual + at[u], /*evict_first=*/true);
        }
      },
      [&](Loaded& loaded, const int64_t (&at)[kBatch], auto valid) {
        const unsigned mask_bits =
            epilogue_forward(epilogue, writes_mask, affines, loaded.batch, loaded.residual, valid);
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (u < valid) loaded.batch[u].store(y + at[u], evict_first);
        }
        if (writes_mask) mask.write(mask_bits, valid);
      },
      writes_mask);
}

}  // namespace cuda
}  // namespace bnorm_ext
