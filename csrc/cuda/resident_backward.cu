// Backward in one launch that reads dy and x once: a team of blocks keeps its tile of both in
// shared memory from the sums to dx.
#include "backward.cuh"
#include "channel.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mask.cuh"
#include "sweep_backward.cuh"
#include "team.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Formula    g = dy * act'(z), z = fma(x - mean, weight * rstd, bias) + residual; dresidual = g;
//            dbias = sum(g), dweight = sum(g * (x - mean)) * rstd; with both divided by n = N * S,
//            dx = ((g - mean_dy) - (x - mean) * (rstd * mean_dy_xhat)) * (weight * rstd);
//            where the statistics are constants (inference) dx = g * (weight * rstd)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     dy, x, residual, dx, dresidual [N, C, S] in one layout; statistics, parameters and
//            their gradients [C]; mask: mask.h
// Mapping    as in forward
// Bytes      reads dy and x once, the residual or, in its place, the mask twice; writes dx and, if
//            asked for, dresidual
// Numerics   g, products and sums of a run in the accumulation type, the rest in double; a thread
//            whose sums are not finite computes them again in double. Results are rounded once.
// Requires   16- or 32-bit values; all blocks of a team resident at once; a mask only with a
//            piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, kShares)
    resident_backward_kernel(ResidentBackwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  using Vector = Values<T, V::kWidth>;
  static_assert(TileTable<V>::kBytes <= kTableBytes, "the plan reserves kTableBytes");
  const TilePlan& tile_plan = p.plan.tile_plan;
  const EpilogueParams epilogue = epilogue_of<V>(p.epilogue);
  const T* residual = static_cast<const T*>(epilogue.residual);
  const int channels = Iterator::channels_of_tile(tile_plan), t = static_cast<int>(threadIdx.x);
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const SmemVectors<T, V::kWidth, V::kMapping> dy_smem(shared, p.plan, 0),
      x_smem(shared, p.plan, 1);
  const Team team(p.plan);
  const TileTable<V> table(shared.table, Iterator(p.shape, tile_plan, 0, team.rank));
  const bool masked = !V::kPlain && p.mask.bytes != nullptr;
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  // Rebuilt on demand, which leaves registers for the sums. Beyond the last tile it has no vector.
  const auto start_of = [&](int64_t tile) { return Iterator(p.shape, tile_plan, tile, team.rank); };
  const auto fetch = [&](int64_t tile) {
    dy_smem.fetch(start_of(tile), tile_plan, dy);
    x_smem.fetch(start_of(tile), tile_plan, x);
  };
  constexpr bool kRefills = SmemVectors<T, V::kWidth, V::kMapping>::kAsync;
  if (kRefills) fetch(team.number);
  int64_t round = 0;
  for (int64_t tile = team.number; tile < tile_plan.tiles; tile += p.plan.teams, ++round) {
    const auto start = [&] { return start_of(tile); };
    if (!kRefills) fetch(tile);
    async_commit();
    const auto channel = [&] { return tile * channels + t; };  // of thread t < channels
    if (t < channels) {
      Affine<A> affine = {};  // read but not used where the tile extends beyond the last channel
      if (channel() < p.shape.C) affine = {p.statistics, p.weight, p.bias, channel()};
      set(table, t, affine);
    }
    __syncthreads();
    async_wait<0>();
    const MeanInRegisters<V, TileTable<V>> affines(table);
    // Calls f(g, x, offset) for each vector and used(i) after it, i being its place; end_run() after
    // each run.
    const auto for_each_used = [&](auto f, auto end_run, auto used) {
      Iterator it = start();
      MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, tile_plan, it);
      int i = 0;
#pragma unroll 1
      while (it.more()) {
        it.template batches<V::kPlain>(
            tile_plan,
            [&](const int64_t (&at)[kBatch], auto valid) {
              const unsigned mask_bits = masked ? mask.read(valid) : 0;
#pragma unroll
              for (int u = 0; u < kBatch; ++u) {
                if (u >= valid) continue;
                Vector residual_vec;
                if (residual != nullptr) residual_vec.load(residual + at[u]);
                const Vector x_vec = x_smem[i + u];
                A g[V::kWidth];
                epilogue_backward(epilogue, masked, mask_bits >> u * kByteBits, affines,
                                  dy_smem[i + u], x_vec, residual_vec, g);
                f(g, x_vec, at[u]);
                used(i + u);
              }
              i += valid;
            },
            /*whole_warp=*/false, kRun);
        end_run();
      }
    };

    GradientSums<V> sums;
    sums.add_all(affines, [&](auto f, auto end_run) { for_each_used(f, end_run, [](int) {}); });
    Pair total = chunk_sum(sums.sum, start(), tile_plan, p.shape);
    total = team_total<Iterator>(total, p.plan, shared, p.staging, team, round);
    set_gradients(table, p, tile, channels, total, /*writes=*/team.rank == 0);

    const GradientWriter<V> gradients(p, p.constant_statistics, /*evict_first=*/false, table);
    Iterator next = start_of(tile + p.plan.teams);
    for_each_used([&](const A(&g)[V::kWidth], const Vector& x_vec,
                      int64_t at) { gradients.write(g, x_vec, at); },
                  [] {},
                  [&](int i) {
                    dy_smem.refill(i, next, dy);
                    x_smem.refill(i, next, x);
                    next.advance(tile_plan);
                  });
    __syncthreads();  // the next tile overwrites the table
  }
  // Blocks of the cluster may still read this one's shared memory.
  if (p.plan.path == Path::Cluster) cluster_sync();
}

template <typename V>
TeamKernel<ResidentBackwardParams>& team_kernel() {
  if constexpr (V::kMapping == Mapping::ChannelsLast) {
    static TeamKernel<ResidentBackwardParams> kernel(sweep_backward_kernel<V>);
    return kernel;
  } else {
    static TeamKernel<ResidentBackwardParams> kernel(resident_backward_kernel<V>);
    return kernel;
  }
}

}  // namespace

cudaError_t launch_resident_backward(const ResidentBackwardParams& p, cudaStream_t stream) {
  return with_variant<kWidestOnChip, true>(
      p.dtype, p.plan.tile_plan, is_plain(p),
      [&](auto variant) { return team_kernel<decltype(variant)>().launch(p, stream); });
}

int64_t resident_backward_blocks(DType dtype, const TilePlan& tile_plan, bool plain, Path path,
                                 int team, int shared_bytes) {
  int64_t count = 0;
  with_variant<kWidestOnChip, true>(dtype, tile_plan, plain, [&](auto variant) {
    count = team_kernel<decltype(variant)>().co_resident(path, team, shared_bytes);
    return cudaSuccess;
  });
  return count;
}

}  // namespace cuda
}  // namespace bnorm_ext
