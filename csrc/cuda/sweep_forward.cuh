// Training forward of ChannelsLast in one launch: a team of blocks sweeps over its tile twice, forward to
// add up and backward to write y.
#pragma once

#include "forward.cuh"
#include "team.cuh"

namespace bnorm_ext {
namespace cuda {

// Formula    as resident_forward_kernel
// Shapes     x, y, residual [N, C, S] in ChannelsLast; statistics and parameters [C]; mask: mask.h
// Mapping    plan.h, block b has tile b % tiles; the chunks of a tile are a team
// Bytes      reads x twice, and first again what it has read last, which is still in the L2; reads
//            the residual once, writes y (where plan.evict_first so that it does not drive x out of
//            the L2) and the mask
// Numerics   as resident_forward_kernel
// Requires   all blocks resident at once, unless a tile is one block's; 16- or 32-bit values
template <typename V>
__global__ void __launch_bounds__(kThreads, kResident)
    sweep_forward_kernel(ResidentForwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  const TilePlan& tile_plan = p.plan.tile_plan;
  const T* x = static_cast<const T*>(p.x);
  const int channels = Iterator::channels_of_tile(tile_plan), t = static_cast<int>(threadIdx.x);
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] { return Iterator(p.shape, tile_plan, blockIdx.x); };
  const auto channel = [&] { return start().tile * channels + t; };  // of thread t < channels
  const auto has_channel = [&] { return t < channels && channel() < p.shape.C; };
  // Before the sums, so that they arrive meanwhile.
  A weight = 1, bias = 0;
  if (has_channel()) {
    weight = get_or(p.weight, channel(), A{1});
    bias = get_or(p.bias, channel(), A{0});
  }
  // What anchor_of gives for the thread's channels.
  Values<T, V::kWidth> anchors;
  if (start().channel < p.shape.C) {
    anchors.load(first_of_channel<T>(p.x, p.shape, start().channel));
  }
  const auto about = [&](int k) -> double {
    const double value = anchors[k];
    return is_finite(value) ? value : 0;
  };
  Pair sum[Iterator::kChannels] = {};
  add_moments<V>(start(), tile_plan, x, about, sum);
  if (!all_finite(sum)) {
    for (Pair& s : sum) s = {0, 0};
    add_moments_in_double<V>(start(), tile_plan, x, about, sum);
  }
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const Team team(start().tile, start().chunk, tile_plan.chunks);
  Pair total = chunk_sum(sum, start(), tile_plan, p.shape);
  total = team_total<Iterator>(total, p.plan, shared, p.staging, team, /*round=*/0);

  BatchStatistics<A> found;  // read but not used where the tile extends beyond the last channel
  if (has_channel()) found = {p, total, anchor_of<T>(p.x, p.shape, channel()), weight, bias};
  const TileTable<V> table(shared.table, start());
  if (t < channels) set(table, t, found.affine);
  __syncthreads();
  // After the barrier, so that the other threads write y meanwhile.
  if (team.rank == 0) {
    if (has_channel()) found.write(p, channel());
    count_batch(p, start().tile);
  }
  const AffineInRegisters<V> affines(table);
  const Iterator it = start();
  const MaskCursor<uint8_t, V::kWidth, V::kMapping> mask(p.mask, tile_plan, it);
  write_y<V>(it.at_the_end(tile_plan), reversed(tile_plan), x, static_cast<T*>(p.y),
             epilogue_of<V>(p.epilogue), affines, mask.at_the_end(it.remaining),
             !V::kPlain && p.mask.bytes != nullptr, tile_plan.evict_first);
}

}  // namespace cuda
}  // namespace bnorm_ext
