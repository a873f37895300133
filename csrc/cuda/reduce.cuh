// The only reductions over warp, block and grid.
//
// Numerics      Everything is added in double: what comes in are sums of at most kBatch values in
//               the accumulation type.
// Determinism   A fixed tree within the warp, warps in order, chunks in order whichever block is
//               the last to arrive. No floating-point atomics.
#pragma once

#include "params.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

static_assert(sizeof(Pair) == kPairBytes, "of which plan.h reserves room");

// Sums value[k] over the rows of the block. Thread i < columns * kChannels receives the total of
// channel i of the tile, the others nothing of use. Every thread must call, and between two calls
// there must be a barrier.
template <int kChannels>
__device__ __forceinline__ Pair block_sum(Pair (&value)[kChannels], int columns) {
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarp, warp = t / kWarp;
  const Shared<Pair> of_warp = dynamic_shared<Pair>(0);  // [kWarps, columns * kChannels]
  // Lanes of the same column are `columns` apart.
  for (int apart = kWarp / 2; apart >= columns; apart /= 2) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      value[k].a += __shfl_xor_sync(0xffffffffu, value[k].a, apart);
      value[k].b += __shfl_xor_sync(0xffffffffu, value[k].b, apart);
    }
  }
  const int channels = columns * kChannels;
  if (lane < columns) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) of_warp[warp * channels + lane * kChannels + k] = value[k];
  }
  __syncthreads();
  Pair total = {0, 0};
  if (t < channels) {
    for (int w = 0; w < kWarps; ++w) {
      const Pair part = of_warp[w * channels + t];
      total.a += part.a;
      total.b += part.b;
    }
  }
  return total;
}

// Whether this block is the last of `count` to arrive at the ticket; it then sees what the others
// wrote before. atomicInc wraps the ticket around to 0 with the last arrival. Every thread calls.
__device__ __forceinline__ bool last_to_arrive(unsigned* ticket, int64_t count) {
  __syncthreads();  // the whole block has written
  int last = 0;
  if (threadIdx.x == 0) {
    const unsigned highest = static_cast<unsigned>(count - 1);
    __threadfence();
    last = atomicInc(ticket, highest) == highest;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

// Sums value[k] over all blocks of the tile. True in every thread of the one block that gets the
// totals: there thread i < columns * kChannels has that of channel i of the tile in `total`.
template <typename Walk>
__device__ __forceinline__ bool tile_sum(Pair (&value)[Walk::kChannels], const Walk& walk,
                                         const WalkPlan& plan, const Exchange& exchange,
                                         Pair* total) {
  constexpr int kChannels = Walk::kChannels;
  *total = block_sum(value, plan.columns);
  if (plan.chunks == 1) return true;
  const int channels = plan.columns * kChannels, t = static_cast<int>(threadIdx.x);
  const Workspace<Pair> of_tile =
      Workspace<Pair>(exchange.partials) + walk.tile * plan.chunks * channels;
  if (t < channels) of_tile[walk.chunk * channels + t] = *total;
  // Its barriers also part the two calls of block_sum.
  if (!last_to_arrive(exchange.ticket + walk.tile, plan.chunks)) return false;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) value[k] = {0, 0};
  for (int64_t chunk = walk.row; chunk < plan.chunks; chunk += plan.rows) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const Pair part = of_tile[chunk * channels + walk.column * kChannels + k];
      value[k].a += part.a;
      value[k].b += part.b;
    }
  }
  *total = block_sum(value, plan.columns);
  return true;
}

}  // namespace cuda
}  // namespace bnorm_ext
