// All reductions over warp, block and grid.
//
// Numerics      Everything is added in double; only sums of a few values, within a thread, are in
//               the accumulation type.
// Determinism   A fixed tree within the warp, then warps in order, then chunks in an order that the
//               plan fixes, whichever block arrives last. No floating-point atomics.
#pragma once

#include "params.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

static_assert(sizeof(Pair) == kPairBytes, "plan.h reserves room for these");

// Where the sum of channel i of a tile lies in shared memory, counted in pairs. A warp serves eight
// lanes at a time where they access 16 bytes each; their pairs fill the 32 banks once if the places
// differ modulo 8. Lanes write channels k, kChannels + k, 2 * kChannels + k, ...: at their own places
// all eight would take turns in the same banks. Lanes read neighbouring channels. Both have places
// that differ where the index within kChannels is flipped by the number of the eight channels.
template <int kChannels>
__device__ __forceinline__ int sum_place(int i) {
  static_assert((kChannels & (kChannels - 1)) == 0 && kChannels <= 8, "");
  return i ^ (i >> 3 & (kChannels - 1));
}

// Sums value[k] over the rows of the block. Thread i < columns * kChannels returns the total of
// channel i of the tile, the others return zeros. Every thread must call, and there must be a
// barrier between two calls.
template <int kChannels>
__device__ __forceinline__ Pair block_sum(Pair (&value)[kChannels], int columns) {
  // Kept in a register from an earlier use on, it would make the statistics kernel spill.
  const int t = computed_here(static_cast<int>(threadIdx.x)), lane = t % kWarp, warp = t / kWarp;
  const Shared<Pair> of_warp = dynamic_shared<Pair>(0);  // [kWarps, columns * kChannels places]
  // Lanes of the same column are `columns` apart.
#pragma unroll 1
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
    for (int k = 0; k < kChannels; ++k) {
      of_warp[warp * channels + sum_place<kChannels>(lane * kChannels + k)] = value[k];
    }
  }
  __syncthreads();
  Pair total = {0, 0};
  if (t < channels) {
    for (int w = 0; w < kWarps; ++w) {
      const Pair part = of_warp[w * channels + sum_place<kChannels>(t)];
      total.a += part.a;
      total.b += part.b;
    }
  }
  return total;
}

// The same in ChannelGroups, where value[k] belongs to channel it.channel_of(k): thread i < group
// returns the total of channel i of the tile. No barrier is needed between two calls.
template <typename Iterator>
__device__ __forceinline__ Pair group_sum(const Pair (&value)[Iterator::kChannels],
                                          const Iterator& it, const TilePlan& plan,
                                          const Shape& shape) {
  constexpr int kWidth = Iterator::kChannels;
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarp, warp = t / kWarp;
  const Shared<Pair> of_thread = dynamic_shared<Pair>(0);    // [first and second channel, kThreads]
  const Shared<Pair> of_channel = of_thread + 2 * kThreads;  // [group]
  Pair first = {0, 0}, second = {0, 0};
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const bool is_first = k < it.split;
    first.a += is_first ? value[k].a : 0;
    first.b += is_first ? value[k].b : 0;
    second.a += is_first ? 0 : value[k].a;
    second.b += is_first ? 0 : value[k].b;
  }
  of_thread[t] = first;
  of_thread[kThreads + t] = second;
  __syncthreads();
  const int S = static_cast<int>(shape.S);
  for (int channel = warp; channel < plan.group; channel += kWarps) {
    // The channel's columns in this block. In a column that begins before the channel it is the
    // second one.
    const int begin = channel * S - it.begin, end = begin + S;
    const int from = begin > 0 ? begin / kWidth : 0;
    const int beyond = end > 0 ? (end + kWidth - 1) / kWidth : 0;
    const int to = beyond < plan.columns ? beyond : plan.columns;
    Pair total = {0, 0};
    for (int column = from + lane; column < to; column += kWarp) {
      const Shared<Pair> parts = of_thread + (column * kWidth < begin ? kThreads : 0) + column;
      for (int row = 0; row < plan.rows; ++row) {
        const Pair part = parts[row * plan.columns];
        total.a += part.a;
        total.b += part.b;
      }
    }
#pragma unroll 1
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      total.a += __shfl_xor_sync(0xffffffffu, total.a, apart);
      total.b += __shfl_xor_sync(0xffffffffu, total.b, apart);
    }
    if (lane == 0) of_channel[channel] = total;
  }
  __syncthreads();
  Pair total = {0, 0};
  if (t < plan.group) total = of_channel[t];
  return total;
}

// One of the two above: thread i < channels_of_tile returns the total of channel i of the tile.
// Every thread must call, and there must be a barrier between two calls.
template <typename Iterator>
__device__ __forceinline__ Pair chunk_sum(Pair (&value)[Iterator::kChannels], const Iterator& it,
                                          const TilePlan& plan, const Shape& shape) {
  if constexpr (Iterator::kGrouped) {
    return group_sum(value, it, plan, shape);
  } else {
    return block_sum(value, plan.columns);
  }
}

// Adds part(r, i) over r < count in a fixed order: thread i < channels returns the total of channel i,
// the others return what is of no use. `channels`: a power of two, at most kThreads. Neighbouring
// threads have neighbouring channels, so that a warp reads whole cache lines. Every thread must call,
// and there must be a barrier between two calls.
template <typename Part>
__device__ __forceinline__ Pair sum_of_parts(int count, int channels, Part part) {
  const int t = static_cast<int>(threadIdx.x), lane = t % kWarp, channel = t & (channels - 1);
  Pair sum = {0, 0};
#pragma unroll 4
  for (int r = t / channels; r < count; r += kThreads / channels) {
    const Pair more = part(r, channel);
    sum.a += more.a;
    sum.b += more.b;
  }
  // Lanes of the same channel are `channels` apart.
#pragma unroll 1
  for (int apart = kWarp / 2; apart >= channels; apart /= 2) {
    sum.a += __shfl_xor_sync(0xffffffffu, sum.a, apart);
    sum.b += __shfl_xor_sync(0xffffffffu, sum.b, apart);
  }
  const Shared<Pair> found = dynamic_shared<Pair>(0);  // [rows, channels]
  const bool in_warp = channels < kWarp;               // then each warp has found one row
  const int rows = in_warp ? kWarps : kThreads / channels;
  if (!in_warp) {
    found[t] = sum;
  } else if (lane < channels) {
    found[t / kWarp * channels + lane] = sum;
  }
  __syncthreads();
  Pair total = {0, 0};
  if (t < channels) {
    for (int row = 0; row < rows; ++row) {
      const Pair more = found[row * channels + t];
      total.a += more.a;
      total.b += more.b;
    }
  }
  return total;
}

// Whether this block is the last of `count` to arrive at the semaphore; it then sees what the
// others wrote before they arrived. The last arrival wraps the semaphore around to 0. Every thread
// must call.
__device__ __forceinline__ bool last_to_arrive(unsigned* semaphore, int64_t count) {
  __syncthreads();  // all threads of the block have written
  int last = 0;
  if (threadIdx.x == 0) {
    const unsigned highest = static_cast<unsigned>(count - 1);
    __threadfence();
    last = atomicInc(semaphore, highest) == highest;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

// Sums value[k] over all blocks of the tile: the last one to arrive adds up what each has found, or
// where there are many, the last one of each kMerged, and the last of these (plan.h). Returns true in
// every thread of the one block that gets the totals: there thread i < channels_of_tile has the total
// of channel i of the tile in `total`.
template <typename Iterator>
__device__ __forceinline__ bool tile_sum(Pair (&value)[Iterator::kChannels], const Iterator& it,
                                         const TilePlan& plan, const Shape& shape,
                                         const Staging& staging, Pair* total) {
  *total = chunk_sum(value, it, plan, shape);
  if (plan.chunks == 1) return true;
  const int channels = Iterator::channels_of_tile(plan), t = static_cast<int>(threadIdx.x);
  const int64_t merges = merges_of(plan.chunks);
  const Workspace<Pair> of_tile =
      Workspace<Pair>(staging.partials) + it.tile * parts_of(plan.chunks) * channels;
  unsigned* const semaphores = staging.semaphores + it.tile * (merges == 1 ? 1 : merges + 1);
  if (t < channels) of_tile[it.chunk * channels + t] = *total;
  // The barriers that are needed between two calls of block_sum are in last_to_arrive.
  const auto merge = [&](int64_t first, int64_t count, unsigned* semaphore) {
    if (!last_to_arrive(semaphore, count)) return false;
    *total = sum_of_parts(static_cast<int>(count), channels, [&](int64_t part, int i) -> Pair {
      return of_tile[(first + part) * channels + i];
    });
    return true;
  };
  if (merges == 1) return merge(0, plan.chunks, semaphores);
  const int64_t number = it.chunk / kMerged, first = number * kMerged;
  const int64_t left = plan.chunks - first;
  if (!merge(first, left < kMerged ? left : kMerged, semaphores + 1 + number)) return false;
  if (t < channels) of_tile[(plan.chunks + number) * channels + t] = *total;
  return merge(plan.chunks, merges, semaphores);
}

}  // namespace cuda
}  // namespace bnorm_ext
