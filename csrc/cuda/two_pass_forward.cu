// Forward in two passes: the statistics of a batch, then the normalisation by known statistics.
#include "channel.cuh"
#include "epilogue.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Formula    mean = sum(x) / n, var = sum((x - mean)^2) / n, rstd = 1 / sqrt(var + eps), with
//            n = N * S; running_mean and running_var moved towards mean and var * n / (n - 1)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     x [N, C, S] in either layout; results [C]
// Mapping    plan.h; the last blocks of a tile to arrive merge the chunks (reduce.cuh)
// Bytes      reads x once
// Numerics   moments.cuh; merged in double
// Requires   semaphores that are 0 and that nobody else uses until the launch is over
template <typename V>
__global__ void __launch_bounds__(kThreads, kResident) statistics_kernel(StatisticsParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  const T* x = static_cast<const T*>(p.x);
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] { return Iterator(p.shape, p.plan, blockIdx.x); };
  const auto about = [&](int k) -> double {
    const Iterator it = start();
    return it.channel < p.shape.C ? anchor_of<T>(p.x, p.shape, it.channel_of(k)) : 0;
  };
  Pair sum[Iterator::kChannels] = {};
  add_moments<V>(start(), p.plan, x, about, sum);
  if (!all_finite(sum)) {
    for (Pair& s : sum) s = {0, 0};
    add_moments_in_double<V>(start(), p.plan, x, about, sum);
  }

  Pair total;
  if (!tile_sum(sum, start(), p.plan, p.shape, p.staging, &total)) return;
  const int channels = Iterator::channels_of_tile(p.plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = start().tile * channels + i;
  if (i >= channels || c >= p.shape.C) return;
  const double n = static_cast<double>(p.shape.N * p.shape.S);
  const double anchor = anchor_of<T>(p.x, p.shape, c), delta = total.a * p.per_value;
  const double mean = anchor + delta;
  const double var = variance_of(total, p.per_value);
  if (p.mean != nullptr) store_mean(p.mean, p.shape.C, c, split_mean<A>(anchor, delta));
  if (p.rstd != nullptr) store_one(static_cast<A*>(p.rstd) + c, rstd_of<A>(var, p.eps));
  if (p.wide_mean != nullptr) store_one(p.wide_mean + c, mean);
  if (p.wide_var != nullptr) store_one(p.wide_var + c, var);
  update_running(p.running, c, mean, var, n);
}

// Formula    y = act(z), z = fma(x - mean, weight * rstd, bias) + residual; where a mask is asked
//            for, its bits are passes_gradient(act, z)
// Shapes     x, y, residual [N, C, S] in one layout; statistics, weight and bias [C]; mask: mask.h
// Mapping    plan.h, blocks in reverse order: what the statistics kernel read last is still in L2
// Bytes      reads x and residual, writes y (where plan.evict_first so that it does not drive x out
//            of the L2) and the mask, an eighth of a byte per element
// Numerics   in the accumulation type, rounded once
// Requires   a mask only with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, kResident) normalise_kernel(NormaliseParams p) {
  using T = typename V::T;
  using Constants = Table<V, kAffineRows>;
  const SecondPass<V> pass(p.shape, p.plan);
  const auto& it = pass.start;
  if (p.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    ++*p.num_batches_tracked;
  }
  const Constants table(/*byte_offset=*/0, it);
  fill(table, p, p.plan, it);
  const MaskCursor<uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
  const AffineInRegisters<V> affines(table);
  write_y<V>(pass.it, pass.plan, static_cast<const T*>(p.x), static_cast<T*>(p.y),
             epilogue_of<V>(p.epilogue), affines, pass.of(mask),
             !V::kPlain && p.mask.bytes != nullptr, p.plan.evict_first);
}

}  // namespace

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream) {
  return with_variant<8, false>(p.dtype, p.plan, true, [&](auto variant) {
    return launch(statistics_kernel<decltype(variant)>, p, p.plan.blocks(),
                  reduce_shared_bytes(p.plan), stream);
  });
}

cudaError_t launch_normalise(const NormaliseParams& p, cudaStream_t stream) {
  return with_variant<8, true>(p.dtype, p.plan, is_plain(p), [&](auto variant) {
    using V = decltype(variant);
    return launch(normalise_kernel<V>, p, p.plan.blocks(), Table<V, kAffineRows>::kBytes, stream);
  });
}

}  // namespace cuda
}  // namespace bnorm_ext
