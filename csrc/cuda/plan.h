// Which threads of which blocks take which part of a tensor: from sizes and device limits alone, in
// plain C++, so that it is tested on any machine.
//
// Two-pass path. A block of kThreads threads is `columns` wide: thread t is in column t % columns
// and row t / columns. A *tile* is the channels that a block reduces, a *chunk* the positions.
//   ChannelsFirst  one column, one channel per tile; the channel's N * S values are numbered in
//                  vectors, and row r takes vectors r, r + kThreads, ... of its chunk
//   ChannelsLast   each column is one vector of channels; row r takes rows r, r + rows, ... of
//                  the chunk's rows of the matrix [N * S, C]
// A grid is tiles * chunks blocks in one dimension: block b has tile b / chunks, chunk b % chunks.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bnorm_ext {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
// Vectors that a thread loads before it uses the first: 64 bytes in flight.
constexpr int kBatch = 4;
// Columns of a block, at most: where accesses are narrow one warp, else 256 bytes of a row, whole
// cache lines.
constexpr int kNarrowColumns = 32;
constexpr int kWideColumns = 16;

struct DeviceLimits {
  int multiprocessors = 1;
};

struct TwoPassPlan {
  int width = 1;             // elements per access: 16 bytes' worth, or 1
  int columns = 1;           // a power of two
  int rows = kThreads;       // kThreads / columns
  int64_t tiles = 0;         // of `channels_per_tile` channels, the last one perhaps fewer
  int64_t chunks = 1;        // per tile
  int64_t chunk_length = 0;  // ChannelsFirst: vectors of the channel; ChannelsLast: rows
  int64_t length = 0;        // of a tile, in the same unit: chunks cover it

  // How a thread goes from one vector to the next, in elements: by `step`, and where that leaves
  // the row of S positions (ChannelsFirst), by `wrap` on to its place in a later one.
  int64_t row_length = 0;  // vectors per row; ChannelsLast: without end
  int64_t row_step = 0;    // vectors within the row
  int64_t step = 0, wrap = 0;

  int64_t blocks() const { return tiles * chunks; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int channels_per_thread(const TwoPassPlan& plan, Layout layout) {
  return layout == Layout::ChannelsLast ? plan.width : 1;
}

inline int channels_per_tile(const TwoPassPlan& plan, Layout layout) {
  return plan.columns * channels_per_thread(plan, layout);
}

// `aligned`: every tensor of the call starts at a multiple of kVectorBytes.
inline TwoPassPlan plan_two_pass(const Shape& shape, int element_bytes, bool aligned,
                                 const DeviceLimits& device) {
  TwoPassPlan plan;
  const bool last = shape.layout == Layout::ChannelsLast;
  const int full = kVectorBytes / element_bytes;
  if (aligned && (last ? shape.C : shape.S) % full == 0) plan.width = full;
  if (last) {
    const int64_t vectors = shape.C / plan.width;
    const int widest = plan.width == 1 ? kNarrowColumns : kWideColumns;
    while (plan.columns < widest && plan.columns < vectors) plan.columns *= 2;
    plan.rows = kThreads / plan.columns;
    plan.tiles = ceil_div(vectors, plan.columns);
    plan.length = shape.N * shape.S;
    plan.row_length = INT64_MAX;
    plan.step = plan.rows * shape.C;
  } else {
    plan.tiles = shape.C;
    plan.row_length = shape.S / plan.width;
    plan.length = shape.N * plan.row_length;
    plan.row_step = kThreads % plan.row_length;
    plan.step = (kThreads / plan.row_length) * shape.C * shape.S + plan.row_step * plan.width;
    plan.wrap = (shape.C - 1) * shape.S;
  }
  // Several blocks per resident one, so that the last ones leave little of the device idle; but
  // each with work for a few batches, which a block's own reduction costs about as much as.
  const int64_t wanted = int64_t{32} * device.multiprocessors;
  const int64_t least = int64_t{2} * kBatch * plan.rows;
  int64_t chunks = ceil_div(wanted, plan.tiles);
  const int64_t most = ceil_div(plan.length, least);
  if (chunks > most) chunks = most;
  plan.chunk_length = ceil_div(ceil_div(plan.length, chunks), plan.rows) * plan.rows;
  plan.chunks = ceil_div(plan.length, plan.chunk_length);
  return plan;
}

// How many partial sums the blocks of a reducing kernel exchange.
inline int64_t partials_of(const TwoPassPlan& plan, Layout layout) {
  return plan.chunks == 1 ? 0 : plan.blocks() * channels_per_tile(plan, layout);
}

}  // namespace cuda
}  // namespace bnorm_ext
