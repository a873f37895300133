// Iterates over the vectors that a thread takes of its block's part of a tensor (plan.h).
#pragma once

#include "params.h"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// A number of vectors as a constant, of a batch that is full.
template <int kCount>
struct Full {
  BNORM_HOST_DEVICE constexpr operator int() const { return kCount; }
};
using FullBatch = Full<kBatch>;

// kChannels: how many separate sums a thread has. If more than one, each value of a vector has its
// own sum: in ChannelsLast the values are channels, in ChannelGroups positions of two channels at
// most.
template <int kWidth, Mapping kMapping>
struct TileIterator {
  static constexpr bool kAlong = kMapping == Mapping::ChannelsFirst;  // vectors of one channel
  static constexpr bool kGrouped = kMapping == Mapping::ChannelGroups;
  static constexpr int kChannels = kAlong ? 1 : kWidth;

  int column, row;  // of this thread in the block
  int64_t tile;     // of this block
  int64_t chunk;    // of this block
  int64_t channel;  // this thread's first one; at least C where it has none
  int64_t offset;   // of the thread's next vector, in elements
  unsigned place;   // of that vector in its row of S positions, in vectors
  int remaining;    // vectors that the thread still has to take
  // ChannelGroups: `begin` is where the block's first column begins in the row of the group, in
  // elements; `first` is this thread's first channel in the group; the first `split` values of a
  // vector belong to it, the others to the next channel.
  int begin, first, split;

  // `block` instead of blockIdx.x, because some kernels take the blocks in reverse order. Grids have
  // fewer than 2^31 blocks, and a division in 32 bits is a fraction of one in 64.
  __device__ __forceinline__ TileIterator(const Shape& shape, const TilePlan& plan, unsigned block)
      : TileIterator(shape, plan, tile_of(plan, block), chunk_of(plan, block)) {}
  __device__ __forceinline__ TileIterator(const Shape& shape, const TilePlan& plan, int64_t tile,
                                          int64_t chunk)
      : tile(tile), chunk(chunk) {
    const int t = static_cast<int>(threadIdx.x);
    row = t / plan.columns;
    column = kGrouped ? t - row * plan.columns : t & (plan.columns - 1);
    const int64_t part = kGrouped ? part_of(plan) : chunk;
    channel = kGrouped ? channel_in_group(shape, plan)
                       : tile * plan.columns * kChannels + column * kChannels;
    const int64_t first_row = part * plan.chunk_length + row;  // or vector
    int64_t end = plan.sweeps ? plan.length : (part + 1) * plan.chunk_length;
    if (end > plan.length) end = plan.length;
    remaining = first_row < end && channel < shape.C
                    ? static_cast<int>((end - first_row + plan.stride - 1) / plan.stride)
                    : 0;
    place = 0;
    if (kAlong) {
      const int64_t n = first_row / plan.row_length, in_row = first_row - n * plan.row_length;
      place = static_cast<unsigned>(in_row);
      offset = (n * shape.C + channel) * shape.S + in_row * kWidth;
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
      if (place >= plan.wraps_at) {
        place -= plan.wraps_at;
        offset += plan.wrap;
      }
    }
    --remaining;
  }

  // At the last vector, for a plan that is reversed (plan.h). Not in ChannelsFirst.
  __device__ __forceinline__ TileIterator at_the_end(const TilePlan& plan) const {
    TileIterator it = *this;
    it.offset += (remaining - 1) * plan.step;
    return it;
  }

  // Whether a vector is left, for this thread or, with `whole_warp`, for any thread of the warp.
  // Then all threads of the warp must call.
  __device__ __forceinline__ bool more(bool whole_warp = false) const {
    return whole_warp ? __any_sync(0xffffffffu, remaining > 0) != 0 : remaining > 0;
  }

  // Calls f(offsets, valid) for kBatch vectors at a time, of which the first `valid` exist. For the
  // batches that are full, `valid` is a constant: nothing is asked for each vector. With
  // `whole_warp` equally often in all threads of the warp, so that f can exchange values between
  // them. `most`: batches, after which it returns; not with `whole_warp`. kSingly: what does not fill
  // a batch is taken one vector at a time, for less code; not with `whole_warp`.
  template <bool kSingly, typename F>
  __device__ __forceinline__ void batches(const TilePlan& plan, F f, bool whole_warp = false,
                                          int most = INT32_MAX) {
    int64_t at[kBatch];
#pragma unroll 1
    for (; most > 0 && full<kBatch>(whole_warp); --most) {
      take(plan, kBatch, at);
      f(at, FullBatch{});
    }
#pragma unroll 1
    for (; most > 0 && more(whole_warp); --most) {
      if constexpr (kSingly) {
        at[0] = offset;
        advance(plan);
        f(at, Full<1>{});
      } else {
        const int valid = remaining < kBatch ? remaining : kBatch;
        take(plan, valid, at);
        f(at, valid);
      }
    }
  }

  // The same for kCount vectors at a time, in two steps: load(loaded, offsets, valid) starts the
  // loads of a batch, and use(loaded, offsets, valid) is called after those of the next one have been
  // started, where kAhead. So loads are in flight while values are used, for twice as many registers.
  template <int kCount, bool kAhead, typename Loaded, typename LoadBatch, typename Use>
  __device__ __forceinline__ void pipelined(const TilePlan& plan, LoadBatch load, Use use,
                                            bool whole_warp = false, int most = INT32_MAX) {
    if (kAhead && full<kCount>(whole_warp)) {
      int64_t at[kCount];
      Loaded loaded;
      take(plan, kCount, at);
      load(loaded, at, Full<kCount>{});
#pragma unroll 1
      for (--most; most > 0 && full<kCount>(whole_warp); --most) {
        int64_t next[kCount];
        Loaded of_next;
        take(plan, kCount, next);
        load(of_next, next, Full<kCount>{});
        use(loaded, at, Full<kCount>{});
        loaded = of_next;
#pragma unroll
        for (int u = 0; u < kCount; ++u) at[u] = next[u];
      }
      use(loaded, at, Full<kCount>{});
    }
#pragma unroll 1
    for (; !kAhead && most > 0 && full<kCount>(whole_warp); --most) {
      int64_t at[kCount];
      Loaded loaded;
      take(plan, kCount, at);
      load(loaded, at, Full<kCount>{});
      use(loaded, at, Full<kCount>{});
    }
#pragma unroll 1
    for (; most > 0 && more(whole_warp); --most) {
      int64_t at[kCount];
      Loaded loaded;
      const int valid = remaining < kCount ? remaining : kCount;
      take(plan, valid, at);
      load(loaded, at, valid);
      use(loaded, at, valid);
    }
  }

 private:
  // In ChannelsLast the tiles of the same rows are neighbours.
  static constexpr bool kTilesFirst = kMapping == Mapping::ChannelsLast;
  static __device__ __forceinline__ int64_t tile_of(const TilePlan& plan, unsigned block) {
    return kTilesFirst ? block % static_cast<unsigned>(plan.tiles)
                       : block / static_cast<unsigned>(plan.chunks);
  }
  static __device__ __forceinline__ int64_t chunk_of(const TilePlan& plan, unsigned block) {
    return kTilesFirst ? block / static_cast<unsigned>(plan.tiles)
                       : block % static_cast<unsigned>(plan.chunks);
  }
  // Whether kCount vectors are left, with `whole_warp` for all threads of the warp.
  template <int kCount>
  __device__ __forceinline__ bool full(bool whole_warp) const {
    return whole_warp ? __all_sync(0xffffffffu, remaining >= kCount) != 0 : remaining >= kCount;
  }
  // The offsets of the next `valid` vectors.
  template <int kCount>
  __device__ __forceinline__ void take(const TilePlan& plan, int valid, int64_t (&at)[kCount]) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      // Elsewhere rows have no end, so that only the first offset needs registers.
      at[u] = kAlong ? offset : offset + u * plan.step;
      if (kAlong && u < valid) advance(plan);
    }
    if (!kAlong) {
      offset += valid * plan.step;
      remaining -= valid;
    }
  }
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

// The way of a second pass, which begins with what the first one has read last. In ChannelsLast each
// block takes its own vectors from the last one to the first one; elsewhere the blocks are reversed.
template <typename V>
struct SecondPass {
  static constexpr bool kBack = V::kMapping == Mapping::ChannelsLast;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  Iterator start;  // the block's first vector
  Iterator it;
  TilePlan plan;

  __device__ __forceinline__ SecondPass(const Shape& shape, const TilePlan& first)
      : start(shape, first, kBack ? blockIdx.x : gridDim.x - 1 - blockIdx.x),
        it(kBack ? start.at_the_end(first) : start),
        plan(kBack ? reversed(first) : first) {}
  template <typename Cursor>
  __device__ __forceinline__ Cursor of(const Cursor& mask) const {
    return kBack ? mask.at_the_end(start.remaining) : mask;
  }
};

}  // namespace cuda
}  // namespace bnorm_ext
