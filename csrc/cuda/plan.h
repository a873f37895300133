// Which threads of which blocks take which part of a tensor: from sizes and device limits alone, in
// plain C++, so that it is tested on any machine.
//
// A *tile* is the channels that one group of blocks works on, and a *chunk* the positions of it
// that one of these blocks takes. A block of kThreads threads is `columns` wide: thread t is in
// column t % columns and row t / columns.
//   ChannelsFirst  one column, one channel per tile; the channel's N * S values are numbered in
//                  vectors, and row r takes vectors r, r + kThreads, ... of its chunk
//   ChannelsLast   each column is one vector of channels; row r takes rows r, r + rows, ... of
//                  the chunk's rows of the matrix [N * S, C]
// A grid is tiles * chunks blocks in one dimension: block b has tile b / chunks, chunk b % chunks.
//
// Paths
//   TwoPass  any size: partial statistics, merged by the last block of a tile to arrive, then a
//            second kernel that reads everything again
//   Block    a tile stays in the shared memory of its one block between statistics and writing
//   Cluster  in that of a team of blocks, which exchange partial sums through it (sm_90 and newer)
//   Grid     in that of a team of blocks of a cooperative launch, which exchange them through
//   global
//            memory; teams take one tile after the other
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

enum class Path : int8_t { TwoPass, Block, Cluster, Grid };

// Of which more than 8 need leave, and may find no device that has them free side by side.
constexpr int kLargestCluster = 16;

struct DeviceLimits {
  int multiprocessors = 1;
  int shared_per_multiprocessor = 0;  // bytes
  int shared_per_block = 0;           // bytes, where a kernel opts in
  int max_cluster = 1;                // blocks; 1: there are no clusters
  bool cooperative = false;           // launches
};

struct WalkPlan {
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

// TwoPass where the tensor cannot stay on chip; `reason` says why, or why the path is no better.
struct ResidentPlan {
  Path path = Path::TwoPass;
  const char* reason = "";
  WalkPlan walk;         // chunks: the blocks of a team
  int64_t teams = 0;     // at work at a time; all of them but in Grid
  int vectors = 0;       // of each tensor that stays on chip, per thread
  int shared_bytes = 0;  // per block

  int64_t blocks() const { return teams * walk.chunks; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int channels_per_thread(const WalkPlan& plan, Layout layout) {
  return layout == Layout::ChannelsLast ? plan.width : 1;
}

inline int channels_per_tile(const WalkPlan& plan, Layout layout) {
  return plan.columns * channels_per_thread(plan, layout);
}

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
static_assert(kThreads % kWarp == 0, "whole warps");
constexpr int kPairBytes = 16;  // two doubles

// Shared memory that a block sums through; `channels`: of a tile.
BNORM_HOST_DEVICE constexpr int reduce_shared_bytes(int channels) {
  return kWarps * channels * kPairBytes;
}

// How many partial sums the blocks of a reducing kernel exchange.
inline int64_t partials_of(const WalkPlan& plan, Layout layout) {
  return plan.chunks == 1 ? 0 : plan.blocks() * channels_per_tile(plan, layout);
}

// Of `columns` at most, in one chunk. `aligned`: every tensor of the call starts at a multiple of
// kVectorBytes.
inline WalkPlan plan_tiles(const Shape& shape, int element_bytes, bool aligned, int columns = 0) {
  WalkPlan plan;
  const bool last = shape.layout == Layout::ChannelsLast;
  const int full = kVectorBytes / element_bytes;
  if (aligned && (last ? shape.C : shape.S) % full == 0) plan.width = full;
  if (last) {
    const int64_t vectors = shape.C / plan.width;
    if (columns == 0) columns = plan.width == 1 ? kNarrowColumns : kWideColumns;
    while (plan.columns < columns && plan.columns < vectors) plan.columns *= 2;
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
  plan.chunk_length = plan.length;
  return plan;
}

// In at most so many chunks, none of them empty.
inline void split(WalkPlan* plan, int64_t chunks) {
  plan->chunk_length = ceil_div(ceil_div(plan->length, chunks), plan->rows) * plan->rows;
  plan->chunks = ceil_div(plan->length, plan->chunk_length);
}

inline int64_t most_chunks(const WalkPlan& plan) {
  // Each with work for a few batches, which a block's own reduction costs about as much as.
  return ceil_div(plan.length, int64_t{2} * kBatch * plan.rows);
}

inline WalkPlan plan_two_pass(const Shape& shape, int element_bytes, bool aligned,
                              const DeviceLimits& device) {
  WalkPlan plan = plan_tiles(shape, element_bytes, aligned);
  // Several blocks per resident one, so that the last ones leave little of the device idle.
  const int64_t wanted = int64_t{32} * device.multiprocessors;
  const int64_t chunks = ceil_div(wanted, plan.tiles), most = most_chunks(plan);
  split(&plan, chunks < most ? chunks : most);
  return plan;
}

// ---- Resident paths --------------------------------------------------------------------------

// Where things are in a block's shared memory, in bytes; all multiples of 16.
struct SharedLayout {
  int team;     // [channels] sums that the team exchanges; before it [kWarps, channels] of a block
  int table;    // constants of the tile's channels, as if it were as wide as can be
  int vectors;  // [tensors, vectors, kThreads] of 16 bytes each
};
constexpr int kTableRows = 5;
constexpr int kTableBytes = kTableRows * kWideColumns * 8 * 4;
BNORM_HOST_DEVICE constexpr SharedLayout shared_layout(int channels) {
  const int team = reduce_shared_bytes(channels), table = team + channels * kPairBytes;
  return {team, table, table + kTableBytes};
}

// The kernels are compiled for so many blocks per multiprocessor at least. That many shares of its
// shared memory let one block load while another one computes or stores.
constexpr int kShares = 2;
constexpr int kReservedBytes = 1024;  // of shared memory, by the driver, per block

// How many blocks of a kernel, or of its clusters, a device holds at once: by its limits alone. In
// a running process the CUDA runtime is asked instead.
struct ByLimits {
  DeviceLimits device;
  int64_t operator()(Path path, int team, int shared_bytes) const {
    const int64_t fit = device.shared_per_multiprocessor / (int64_t{shared_bytes} + kReservedBytes);
    const int64_t blocks = device.multiprocessors * (fit < kShares ? fit : kShares);
    return path == Path::Cluster ? blocks / team : blocks;
  }
};

// Any path, the best one; or one path if at all possible, for tests and measurements. Where a tile
// is no more than one block's work, a team is that block.
struct Wanted {
  bool any = true;
  Path path = Path::TwoPass;
  bool may_be(Path p) const { return any || path == p; }
};

// How a kernel keeps `tensors` tensors of x's shape on chip (1 forward, 2 backward).
// co_resident(path, team, shared_bytes): how many clusters of `team` blocks, or else blocks, the
// device holds at once.
template <typename CoResident>
ResidentPlan plan_resident(const Shape& shape, int element_bytes, bool aligned, int tensors,
                           const DeviceLimits& device, CoResident co_resident,
                           const Wanted& wanted = {}) {
  ResidentPlan plan;
  const bool last = shape.layout == Layout::ChannelsLast;
  const auto refuse = [&](const char* reason) {
    plan.path = Path::TwoPass;
    plan.reason = reason;
    return plan;
  };
  if (!wanted.any && wanted.path == Path::TwoPass) return refuse("two passes were asked for");
  if (element_bytes > 4) return refuse("float64 is not kept on chip");
  if (!aligned) return refuse("a tensor does not start at a multiple of 16 bytes");
  if ((last ? shape.C : shape.S) * element_bytes % kVectorBytes != 0) {
    return refuse(last ? "rows of C values are not a multiple of 16 bytes"
                       : "rows of S values are not a multiple of 16 bytes");
  }
  const int64_t full = device.shared_per_block;
  const int64_t half = device.shared_per_multiprocessor / kShares - kReservedBytes;
  const int64_t shares[] = {half < full ? half : full, full};
  const auto bytes_of = [&](const WalkPlan& walk, int64_t vectors) {
    return shared_layout(channels_per_tile(walk, shape.layout)).vectors +
           vectors * tensors * kThreads * kVectorBytes;
  };
  const auto fits = [&](const WalkPlan& walk, int64_t team, int64_t share) {
    return bytes_of(walk, ceil_div(ceil_div(walk.length, team), walk.rows)) <= share;
  };
  const auto take = [&](Path path, const WalkPlan& walk, int64_t team) {
    plan.walk = walk;
    split(&plan.walk, team);
    plan.path = path == Path::Cluster && plan.walk.chunks == 1 ? Path::Block : path;
    plan.teams = plan.walk.tiles;
    plan.vectors = static_cast<int>(plan.walk.chunk_length / plan.walk.rows);
    plan.shared_bytes = static_cast<int>(bytes_of(plan.walk, plan.vectors));
  };
  // Blocks per team that give every multiprocessor something to do.
  const auto filling = [&](const WalkPlan& walk, int64_t blocks) {
    const int64_t fill = blocks / walk.tiles, most = most_chunks(walk);
    return fill < 1 ? 1 : fill < most ? fill : most;
  };

  // Teams as small as the share allows, or as large as fills the device. In ChannelsLast 256 bytes
  // of a row are read best; 128 or 64 where only the smaller slab fits.
  constexpr int kNarrowest = 4;
  const int64_t largest = wanted.may_be(Path::Cluster) ? device.max_cluster : 1;
  for (const int64_t share : shares) {
    for (int columns = kWideColumns; columns >= kNarrowest; columns /= 2) {
      if (!wanted.may_be(Path::Block) && !wanted.may_be(Path::Cluster)) break;
      const WalkPlan walk = plan_tiles(shape, element_bytes, aligned, columns);
      int64_t team = filling(walk, int64_t{device.multiprocessors} * kShares);
      if (team < 2 && !wanted.may_be(Path::Block)) team = 2;
      if (team > largest) team = largest;
      while (team < largest && !fits(walk, team, share)) ++team;
      if (fits(walk, team, share)) {
        take(team > 1 ? Path::Cluster : Path::Block, walk, team);
        const int blocks = static_cast<int>(plan.walk.chunks);
        if (co_resident(plan.path, blocks, plan.shared_bytes) > 0) return plan;
      }
      if (!last) break;
    }
  }
  if (!device.cooperative || !wanted.may_be(Path::Grid)) {
    return refuse("the tensor is larger than blocks that share their memory hold");
  }
  const WalkPlan walk = plan_tiles(shape, element_bytes, aligned, last ? kNarrowest : 1);
  for (const int64_t share : shares) {
    const int64_t vectors =
        (share - bytes_of(walk, 0)) / (int64_t{tensors} * kThreads * kVectorBytes);
    if (vectors < 1) continue;
    const int64_t least = ceil_div(walk.length, vectors * walk.rows);
    take(Path::Grid, walk, least);
    const int64_t blocks = co_resident(Path::Grid, 1, plan.shared_bytes);
    if (filling(walk, blocks) > least) take(Path::Grid, walk, filling(walk, blocks));
    if (plan.teams > blocks / plan.walk.chunks) plan.teams = blocks / plan.walk.chunks;
    if (plan.teams > 0) return plan;
  }
  return refuse("a group of channels is larger than the shared memory of the device");
}

}  // namespace cuda
}  // namespace bnorm_ext
