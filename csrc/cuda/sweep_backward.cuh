// Backward of ChannelsLast in one launch: a team of blocks sweeps over its tile twice, forward to add up
// and backward to write dx.
#pragma once

#include "backward.cuh"
#include "team.cuh"

namespace bnorm_ext {
namespace cuda {

// Formula    as resident_backward_kernel
// Shapes     dy, x, residual, dx, dresidual [N, C, S] in ChannelsLast; statistics, parameters and
//            their gradients [C]; mask: mask.h
// Mapping    as sweep_forward_kernel
// Bytes      reads dy, x and the residual or, in its place, the mask twice, and first again what it has
//            read last, which is still in the L2; writes dx and, if asked for, dresidual, where
//            plan.evict_first so that they do not drive the others out of the L2
// Numerics   as resident_backward_kernel
// Requires   all blocks resident at once, unless a tile is one block's; 16- or 32-bit values; a mask
//            only with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, kResident)
    sweep_backward_kernel(ResidentBackwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  using Cursor = MaskCursor<const uint8_t, V::kWidth, V::kMapping>;
  const TilePlan& tile_plan = p.plan.tile_plan;
  const int channels = Iterator::channels_of_tile(tile_plan);
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] { return Iterator(p.shape, tile_plan, blockIdx.x); };
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const TileTable<V> table(shared.table, start());
  fill(table, p, tile_plan, start());
  const MeanInRegisters<V, TileTable<V>> affines(table);
  GradientSums<V> sums;
  sums.add_all(affines, [&](auto f, auto end_run) {
    const Iterator it = start();
    for_each_gradient<V, V::kPlain, /*kLastTime=*/false>(it, tile_plan, p, affines,
                                                         Cursor(p.mask, tile_plan, it), f, end_run);
  });
  const Team team(start().tile, start().chunk, tile_plan.chunks);
  Pair total = chunk_sum(sums.sum, start(), tile_plan, p.shape);
  total = team_total<Iterator>(total, p.plan, shared, p.staging, team, /*round=*/0);
  set_gradients(table, p, team.number, channels, total, /*writes=*/team.rank == 0);

  const GradientWriter<V> gradients(p, p.constant_statistics, tile_plan.evict_first, table);
  const Iterator it = start();
  for_each_gradient<V, V::kPlain, /*kLastTime=*/true>(
      it.at_the_end(tile_plan), reversed(tile_plan), p, affines,
      Cursor(p.mask, tile_plan, it).at_the_end(it.remaining),
      [&](const A(&g)[V::kWidth], const Values<T, V::kWidth>& x, int64_t at) {
        gradients.write(g, x, at);
      },
      [] {});
}

}  // namespace cuda
}  // namespace bnorm_ext
