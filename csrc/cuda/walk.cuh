// A thread's way through its block's part of a tensor (plan.h says which part).
#pragma once

#include "params.h"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// kChannels: channels per thread, width in ChannelsLast and 1 in ChannelsFirst.
template <int kWidth, bool kLast>
struct Walk {
  static constexpr int kChannels = kLast ? kWidth : 1;

  int column, row;    // of this thread in the block
  int64_t tile;       // of this block
  int64_t chunk;      // of this block
  int64_t channel;    // this thread's first one
  int64_t offset;     // in elements, of the thread's next vector
  int64_t place;      // of that vector in its row of S positions, in vectors
  int64_t remaining;  // vectors that the thread has still to take

  // `block` instead of blockIdx.x, since some kernels go backwards.
  __device__ __forceinline__ Walk(const Shape& shape, const WalkPlan& plan, int64_t block) {
    const int t = static_cast<int>(threadIdx.x);
    column = t & (plan.columns - 1);
    row = t / plan.columns;
    tile = block / plan.chunks;
    chunk = block - tile * plan.chunks;
    channel = tile * plan.columns * kChannels + column * kChannels;
    const int64_t first = chunk * plan.chunk_length + row;
    int64_t end = (chunk + 1) * plan.chunk_length;
    if (end > plan.length) end = plan.length;
    remaining = first < end && channel < shape.C ? (end - first + plan.rows - 1) / plan.rows : 0;
    if (kLast) {
      place = 0;
      offset = first * shape.C + channel;
    } else {
      const int64_t n = first / plan.row_length;
      place = first - n * plan.row_length;
      offset = (n * shape.C + channel) * shape.S + place * kWidth;
    }
  }

  __device__ __forceinline__ void advance(const WalkPlan& plan) {
    offset += plan.step;
    if (!kLast) {
      place += plan.row_step;
      if (place >= plan.row_length) {
        place -= plan.row_length;
        offset += plan.wrap;
      }
    }
    --remaining;
  }

  // Whether there is a vector left; `together`: for any thread of the warp, all of which must call.
  __device__ __forceinline__ bool more(bool together = false) const {
    return together ? __any_sync(0xffffffffu, remaining > 0) != 0 : remaining > 0;
  }

  // Calls f(offsets, valid) for kBatch vectors at a time, the first `valid` of which are there.
  // `together`: in all threads of the warp as often, for f to exchange values between them.
  template <typename F>
  __device__ __forceinline__ void batches(const WalkPlan& plan, F f, bool together = false) {
    while (more(together)) {
      const int valid = remaining < kBatch ? static_cast<int>(remaining) : kBatch;
      int64_t at[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        // Without end in ChannelsLast, so that none but the first needs registers.
        at[u] = kLast ? offset + u * plan.step : offset;
        if (!kLast && u < valid) advance(plan);
      }
      if (kLast) {
        offset += valid * plan.step;
        remaining -= valid;
      }
      f(at, valid);
    }
  }
};

}  // namespace cuda
}  // namespace bnorm_ext
