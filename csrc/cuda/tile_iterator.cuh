// Iterates over the vectors that a thread takes of its block's part of a tensor (plan.h).
#pragma once

#include "params.h"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// kChannels: how many separate sums a thread has. If more than one, each value of a vector has its
// own sum: in ChannelsLast the values are channels, in ChannelGroups positions of two channels at
// most.
template <int kWidth, Mapping kMapping>
struct TileIterator {
  static constexpr bool kAlong = kMapping == Mapping::ChannelsFirst;  // vectors of one channel
  static constexpr bool kGrouped = kMapping == Mapping::ChannelGroups;
  static constexpr int kChannels = kAlong ? 1 : kWidth;

  int column, row;    // of this thread in the block
  int64_t tile;       // of this block
  int64_t chunk;      // of this block
  int64_t channel;    // this thread's first one; at least C where it has none
  int64_t offset;     // of the thread's next vector, in elements
  int64_t place;      // of that vector in its row of S positions, in vectors
  int64_t remaining;  // vectors that the thread still has to take
  // ChannelGroups: `begin` is where the block's first column begins in the row of the group, in
  // elements; `first` is this thread's first channel in the group; the first `split` values of a
  // vector belong to it, the others to the next channel.
  int begin, first, split;

  // `block` instead of blockIdx.x, because some kernels take the blocks in reverse order.
  __device__ __forceinline__ TileIterator(const Shape& shape, const TilePlan& plan, int64_t block) {
    const int t = static_cast<int>(threadIdx.x);
    tile = block / plan.chunks;
    chunk = block - tile * plan.chunks;
    row = t / plan.columns;
    column = kGrouped ? t - row * plan.columns : t & (plan.columns - 1);
    const int64_t part = kGrouped ? part_of(plan) : chunk;
    channel = kGrouped ? channel_in_group(shape, plan)
                       : tile * plan.columns * kChannels + column * kChannels;
    const int64_t first_row = part * plan.chunk_length + row;  // or vector
    int64_t end = (part + 1) * plan.chunk_length;
    if (end > plan.length) end = plan.length;
    remaining =
        first_row < end && channel < shape.C ? (end - first_row + plan.rows - 1) / plan.rows : 0;
    place = 0;
    if (kAlong) {
      const int64_t n = first_row / plan.row_length;
      place = first_row - n * plan.row_length;
      offset = (n * shape.C + channel) * shape.S + place * kWidth;
    } else if (kGrouped) {
      offset = (first_row * shape.C + tile * plan.group) * shape.S + begin + column * kWidth;
    } else {
      offset = first_row * shape.C + channel;
    }
  }

  static __device__ __forceinline__ int channels_of_tile(const TilePlan& plan) {
    return kGrouped ? plan.group : plan.columns * kChannels;
  }
  // How many values of a vector belong to the thread's first channel.
  __device__ __forceinline__ int split_of_vector() const { return kGrouped ? split : kWidth; }
  // The channel of the k-th of the kChannels sums.
  __device__ __forceinline__ int64_t channel_of(int k) const {
    return kGrouped ? channel + (k >= split) : channel + k;
  }

  __device__ __forceinline__ void advance(const TilePlan& plan) {
    offset += plan.step;
    if (kAlong) {
      place += plan.row_step;
      if (place >= plan.row_length) {
        place -= plan.row_length;
        offset += plan.wrap;
      }
    }
    --remaining;
  }

  // Whether a vector is left, for this thread or, with `whole_warp`, for any thread of the warp.
  // Then all threads of the warp must call.
  __device__ __forceinline__ bool more(bool whole_warp = false) const {
    return whole_warp ? __any_sync(0xffffffffu, remaining > 0) != 0 : remaining > 0;
  }

  // Calls f(offsets, valid) for kBatch vectors at a time, of which the first `valid` exist. With
  // `whole_warp` equally often in all threads of the warp, so that f can exchange values between
  // them.
  template <typename F>
  __device__ __forceinline__ void batches(const TilePlan& plan, F f, bool whole_warp = false) {
    while (more(whole_warp)) {
      const int valid = remaining < kBatch ? static_cast<int>(remaining) : kBatch;
      int64_t at[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        // Elsewhere rows have no end, so that only the first offset needs registers.
        at[u] = kAlong ? offset : offset + u * plan.step;
        if (kAlong && u < valid) advance(plan);
      }
      if (!kAlong) {
        offset += valid * plan.step;
        remaining -= valid;
      }
      f(at, valid);
    }
  }

 private:
  // The number of this block's chunk among those of its piece; sets `begin`. In 32 bits, which
  // kMostGroupedPositions makes enough: a 64-bit division takes four times as long.
  __device__ __forceinline__ int64_t part_of(const TilePlan& plan) {
    const unsigned number = static_cast<unsigned>(chunk);
    const unsigned part = number / static_cast<unsigned>(plan.pieces);
    begin = static_cast<int>(number - part * plan.pieces) * plan.columns * kWidth;
    return part;
  }
  __device__ __forceinline__ int64_t channel_in_group(const Shape& shape, const TilePlan& plan) {
    const int S = static_cast<int>(shape.S), at = begin + column * kWidth;
    first = at / S;
    split = (first + 1) * S - at;
    if (row < plan.rows && first < plan.group) return tile * plan.group + first;
    first = 0;
    split = kWidth;
    return shape.C;
  }
};

}  // namespace cuda
}  // namespace bnorm_ext
