// Which threads of which blocks take which part of a tensor. Decided from sizes and device limits
// alone, in plain C++, so that it can be tested on any machine.
//
// A *tile* is the set of channels that one group of blocks works on; a *chunk* is the part of the
// tile that one of these blocks takes. A block of kThreads threads is `columns` wide: thread t is
// in column t % columns and row t / columns.
//   ChannelsFirst  one column, one channel per tile; the channel's N * S values are numbered in
//                  vectors, and row r takes vectors r, r + kThreads, ... of its chunk
//   ChannelsLast   each column is one vector of channels; row r takes rows r, r + rows, ... of
//                  the chunk's rows of the matrix [N * S, C]. Where blocks sweep over the tensor
//                  together (`sweeps`), chunk k takes rows k * rows + r, then every
//                  (chunks * rows)-th one after it
//   ChannelGroups  where a row of S values is not a whole number of vectors, but the rows of 2 to
//                  16 channels together are: a tile is such a group of channels, each column one
//                  vector of its group * S values, which belong to two channels at most; row r
//                  takes rows r, r + rows, ... of the chunk's rows of the matrix [N, C * S]. Rows
//                  longer than a block is wide are cut into `pieces`: chunk k has piece k % pieces.
//                  Threads beyond rows * columns, and columns beyond the last vector, have nothing
//                  to do.
// The grid is one-dimensional, tiles * chunks blocks: block b has tile b / chunks and chunk b % chunks,
// or in ChannelsLast tile b % tiles and chunk b / tiles.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bnorm_ext {
namespace cuda {

constexpr int kThreads = 256;
// How many blocks of a kernel of two passes a multiprocessor holds at once, at least: the kernels are
// compiled for it. More would leave too few registers for the sums of many channels.
constexpr int kResident = 2;
constexpr int kVectorBytes = 16, kLineBytes = 128;
// Vectors of a batch. A thread loads the next batch before it uses the last one, so that 64 bytes are
// in flight.
constexpr int kBatch = 4;
// Columns of a block in ChannelsLast, at most. Narrow accesses, of one value: one warp. Wide ones,
// of 16 bytes: 256 bytes of a row, which are whole cache lines.
constexpr int kNarrowColumns = 32;
constexpr int kWideColumns = 16;

// Vectors in a row of S positions, at most, where there is more than one: as many as fit 32 bits
// after a step beyond the end.
constexpr int64_t kLongestRow = int64_t{UINT32_MAX} - kThreads;
// Channels of a group, at most.
constexpr int kMostGrouped = 16;
// The largest S for which every index into a row of a group fits 32 bits.
constexpr int64_t kMostGroupedPositions = int64_t{1} << 26;

enum class Mapping : int8_t { ChannelsFirst, ChannelsLast, ChannelGroups };

struct DeviceLimits {
  int multiprocessors = 1;
  int shared_per_multiprocessor = 0;  // bytes
  int shared_per_block = 0;           // bytes, if the kernel opts in
  int max_cluster = 1;                // blocks; 1: no clusters
  bool cooperative = false;           // whether there are cooperative launches
  bool beside_collectives = false;    // whether kernels of collectives may run at the same time
  int l2_bytes = 0;                   // 0: unknown
  int gigabytes_per_second = 0;       // of memory, as the data sheet has it; 0: unknown
  int clock_mhz = 0;                  // of a multiprocessor; 0: unknown
};

struct TilePlan {
  Mapping mapping = Mapping::ChannelsFirst;
  // Whether what is written gives way first in the L2: then the input of a second pass stays there
  // that the first one read last. Where a tensor fits, the next operator finds the output instead.
  bool evict_first = false;
  int width = 1;             // elements per access: 16 bytes' worth, or 1
  int columns = 1;           // a power of two, except in ChannelGroups
  int rows = kThreads;       // kThreads / columns
  int group = 0;             // ChannelGroups: channels of a tile, a power of two
  int pieces = 1;            // ChannelGroups: that a group's row is cut into
  int64_t tiles = 0;         // of `channels_per_tile` channels; the last one may have fewer
  int64_t chunks = 1;        // per tile, a multiple of `pieces`
  int64_t chunk_length = 0;  // ChannelsFirst: vectors of the channel; else rows
  int64_t length = 0;        // of a tile, in the same unit; the chunks of each piece cover it
  // ChannelsLast: chunks take turns, `rows` rows at a time, so that the blocks read the tensor from its
  // beginning to its end together.
  bool sweeps = false;
  int64_t stride = kThreads;  // from a thread's vector to its next one, in the same unit

  // A thread advances from one vector to its next one by `step` elements. Where that leaves the row
  // of S positions (ChannelsFirst), it advances by `wrap` more, to its place in a later row.
  int64_t row_length = 0;  // vectors per row; INT64_MAX where threads do not move along S
  unsigned wraps_at = 0;   // row_length; in 32 bits, which saves half of the instructions
  unsigned row_step = 0;   // by how many vectors `step` moves within the row
  int64_t step = 0, wrap = 0;

  int64_t blocks() const { return tiles * chunks; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int channels_per_tile(const TilePlan& plan) {
  switch (plan.mapping) {
    case Mapping::ChannelsFirst:
      return 1;
    case Mapping::ChannelsLast:
      return plan.columns * plan.width;
    default:
      return plan.group;
  }
}

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
static_assert(kThreads % kWarp == 0, "whole warps");
constexpr int kPairBytes = 16;  // two doubles

// Shared memory for the sums of a block: a pair for each warp and channel, or in ChannelGroups two
// for each thread and one for each channel.
BNORM_HOST_DEVICE constexpr int reduce_shared_bytes(Mapping mapping, int channels) {
  return (mapping == Mapping::ChannelGroups ? 2 * kThreads + channels : kWarps * channels) *
         kPairBytes;
}

inline int reduce_shared_bytes(const TilePlan& plan) {
  return reduce_shared_bytes(plan.mapping, channels_per_tile(plan));
}

// The last block of each `kMerged` chunks adds these up, and the last of those blocks what they have
// found, so that no block reads many. Where there are few chunks, one block adds all of them.
constexpr int kMerged = 16;
BNORM_HOST_DEVICE constexpr int64_t merges_of(int64_t chunks) {
  return chunks <= 2 * kMerged ? 1 : (chunks + kMerged - 1) / kMerged;
}
// How many partial sums of a tile there are: of the chunks and of what is merged from them.
BNORM_HOST_DEVICE constexpr int64_t parts_of(int64_t chunks) {
  return merges_of(chunks) == 1 ? chunks : chunks + merges_of(chunks);
}
// How many partial sums the blocks of a reducing kernel exchange, as pairs.
inline int64_t partials_of(const TilePlan& plan) {
  return plan.chunks == 1 ? 0 : plan.tiles * parts_of(plan.chunks) * channels_per_tile(plan);
}
// How many semaphores they need: for each tile one for every merge, and one for the last.
inline int64_t semaphores_of(const TilePlan& plan) {
  return plan.tiles * (merges_of(plan.chunks) == 1 ? 1 : merges_of(plan.chunks) + 1);
}

// The channels of a group, where ChannelGroups applies; else 0.
constexpr int channels_of_group(const Shape& shape, int element_bytes) {
  const int full = kVectorBytes / element_bytes;
  if (shape.layout != Layout::ChannelsFirst || element_bytes > 4 || shape.S % full == 0 ||
      shape.S < full || shape.S > kMostGroupedPositions) {
    return 0;
  }
  int group = 2;
  while (group * shape.S % full != 0) group *= 2;
  // As long as a row of a tile in ChannelsLast, if the channels divide so.
  while (2 * group <= kMostGrouped && group * shape.S < kWideColumns * full &&
         shape.C % (2 * group) == 0) {
    group *= 2;
  }
  return shape.C % group == 0 ? group : 0;
}
static_assert(channels_of_group({1, 64, 49, Layout::ChannelsFirst}, 2) == 8, "784 bytes");
static_assert(channels_of_group({1, 64, 196, Layout::ChannelsFirst}, 2) == 2, "784 bytes");
static_assert(channels_of_group({1, 64, 196, Layout::ChannelsFirst}, 4) == 0, "whole vectors");

// The plan with one chunk per piece. `columns`: at most, in ChannelsLast; 0 for the default.
// `aligned`: every tensor of the call starts at a multiple of kVectorBytes.
inline TilePlan plan_tiles(const Shape& shape, int element_bytes, bool aligned, int columns = 0) {
  TilePlan plan;
  const bool last = shape.layout == Layout::ChannelsLast;
  const int full = kVectorBytes / element_bytes;
  const int group = aligned ? channels_of_group(shape, element_bytes) : 0;
  if (group != 0 || (aligned && (last ? shape.C : shape.S) % full == 0)) plan.width = full;
  if (last) {
    plan.mapping = Mapping::ChannelsLast;
    const int64_t vectors = shape.C / plan.width;
    if (columns == 0) columns = plan.width == 1 ? kNarrowColumns : kWideColumns;
    while (plan.columns < columns && plan.columns < vectors) plan.columns *= 2;
    plan.rows = kThreads / plan.columns;
    plan.tiles = ceil_div(vectors, plan.columns);
    plan.length = shape.N * shape.S;
    plan.row_length = INT64_MAX;
    plan.stride = plan.rows;
    plan.step = plan.rows * shape.C;
  } else if (group != 0) {
    plan.mapping = Mapping::ChannelGroups;
    plan.group = group;
    const int vectors = static_cast<int>(group * shape.S / full);
    plan.pieces = static_cast<int>(ceil_div(vectors, kThreads));
    plan.columns = static_cast<int>(ceil_div(vectors, plan.pieces));
    plan.rows = kThreads / plan.columns;
    plan.tiles = shape.C / group;
    plan.chunks = plan.pieces;
    plan.length = shape.N;
    plan.row_length = INT64_MAX;
    plan.stride = plan.rows;
    plan.step = plan.rows * shape.C * shape.S;
  } else {
    plan.tiles = shape.C;
    plan.row_length = shape.S / plan.width;
    plan.length = shape.N * plan.row_length;
    const bool wraps = shape.N > 1;  // else the place in the row is not counted
    plan.wraps_at = wraps ? static_cast<unsigned>(plan.row_length) : UINT32_MAX;
    plan.row_step = wraps ? static_cast<unsigned>(kThreads % plan.row_length) : 0;
    plan.step = wraps ? (kThreads / plan.row_length) * shape.C * shape.S +
                            int64_t{plan.row_step} * plan.width
                      : int64_t{kThreads} * plan.width;
    plan.wrap = (shape.C - 1) * shape.S;
  }
  plan.chunk_length = plan.length;
  return plan;
}

// Splits each piece into at most `chunks` chunks, none of them empty.
inline void split(TilePlan* plan, int64_t chunks) {
  plan->chunk_length = ceil_div(ceil_div(plan->length, chunks), plan->rows) * plan->rows;
  plan->chunks = ceil_div(plan->length, plan->chunk_length) * plan->pieces;
}

// ChannelsLast: the blocks of a tile take turns, so that they sweep over the tensor together.
inline void sweep(TilePlan* plan, const Shape& shape) {
  plan->sweeps = true;
  plan->chunk_length = plan->rows;
  plan->stride = plan->chunks * plan->rows;
  plan->step = plan->stride * shape.C;
}

// The same vectors of each thread, from the last one to the first one (TileIterator::at_the_end).
BNORM_HOST_DEVICE TilePlan reversed(TilePlan plan) {
  plan.step = -plan.step;
  return plan;
}

// How many chunks of each piece make about `blocks` blocks in all. Fewer where a chunk would have
// less than two batches per thread, which take about as long as the reduction of a block.
inline int64_t filling(const TilePlan& plan, int64_t blocks) {
  const int64_t fill = blocks / (plan.tiles * plan.pieces);
  const int64_t most = ceil_div(plan.length, int64_t{2} * kBatch * plan.rows);
  return fill < 1 ? 1 : fill < most ? fill : most;
}

// The plan of both kernels of two passes, the one that adds up and the one that writes.
inline TilePlan plan_two_pass(const Shape& shape, int element_bytes, bool aligned,
                              const DeviceLimits& device) {
  // In ChannelsLast blocks add up what others have found for every channel of a tile: so the tiles are
  // narrow, a cache line of each row. Where a tensor is larger than the L2, memory is faster by two lines
  // of each row. The second pass has the same plan: each block begins with what it has read last, which
  // is still in the L2.
  const bool last = shape.layout == Layout::ChannelsLast;
  const bool is_large =
      device.l2_bytes > 0 && shape.N * shape.C * shape.S > device.l2_bytes / element_bytes;
  TilePlan plan = plan_tiles(shape, element_bytes, aligned);
  if (last && plan.width > 1 && !is_large) {
    plan = plan_tiles(shape, element_bytes, aligned, kLineBytes / kVectorBytes);
  }
  plan.evict_first = is_large;
  // All blocks run at once, where there are not more tiles than that.
  split(&plan, filling(plan, int64_t{kResident} * device.multiprocessors));
  if (last) sweep(&plan, shape);
  return plan;
}

}  // namespace cuda
}  // namespace bnorm_ext
