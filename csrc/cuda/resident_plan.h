// Which tensors stay on chip between statistics and writing, and how: from sizes, device limits and
// what the runtime says is resident, in plain C++ like plan.h.
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

#include "plan.h"

namespace bnorm_ext {
namespace cuda {

enum class Path : int8_t { TwoPass, Block, Cluster, Grid };

// Of which more than 8 need leave, and may find no device that has them free side by side.
constexpr int kLargestCluster = 16;

// TwoPass where the tensor cannot stay on chip; `reason` says why, or why the path is no better.
struct ResidentPlan {
  Path path = Path::TwoPass;
  const char* reason = "";
  TilePlan tile_plan;    // chunks: the blocks of a team
  int64_t teams = 0;     // at work at a time; all of them but in Grid
  int vectors = 0;       // of each tensor that stays on chip, per thread
  int shared_bytes = 0;  // per block

  int64_t blocks() const { return teams * tile_plan.chunks; }
};

// Where things are in a block's shared memory, in bytes; all multiples of 16.
struct SharedLayout {
  int team;     // [channels] sums that the team exchanges; before it those of a block
  int table;    // constants of the tile's channels, as if it were as wide as can be
  int vectors;  // [tensors, vectors, kThreads], of 16 bytes each or of a value
};
constexpr int kTableRows = 5;
constexpr int kTableBytes = kTableRows * kWideColumns * 8 * 4;
static_assert(kMostGrouped <= kWideColumns, "in ChannelGroups a row of the table is a group");
BNORM_HOST_DEVICE constexpr SharedLayout shared_layout(Mapping mapping, int channels) {
  const int team = reduce_shared_bytes(mapping, channels), table = team + channels * kPairBytes;
  return {team, table, table + kTableBytes};
}

// Bytes of a value that the kernels are compiled for, at most.
constexpr int kWidestOnChip = 4;

// The kernels are compiled for so many blocks per multiprocessor at least. That many shares of its
// shared memory let one block load while another one computes or stores.
constexpr int kShares = 2;
constexpr int kReservedBytes = 1024;  // of shared memory, by the driver, per block

// How many blocks of a kernel, or of its clusters, a device holds at once: by its limits alone. In
// a running process the CUDA runtime is asked instead.
struct ByLimits {
  DeviceLimits device;
  int64_t operator()(const TilePlan&, Path path, int team, int shared_bytes) const {
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
// co_resident(walk, path, team, shared_bytes): how many clusters of `team` blocks, or else blocks,
// the device holds at once.
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
  if (element_bytes > kWidestOnChip) return refuse("float64 is not kept on chip");
  // In ChannelsLast 256 bytes of a row are read best, 128 or 64 where only the smaller slab fits;
  // of rows that are not of whole vectors, 32 or 16 values.
  const bool narrow = plan_tiles(shape, element_bytes, aligned).width == 1;
  const int widest = narrow ? kNarrowColumns : kWideColumns, least = narrow ? kWideColumns : 4;
  const TilePlan narrowest = plan_tiles(shape, element_bytes, aligned, least);
  const int64_t full = device.shared_per_block;
  const int64_t half = device.shared_per_multiprocessor / kShares - kReservedBytes;
  const int64_t shares[] = {half < full ? half : full, full};
  const int64_t vector_bytes = int64_t{narrowest.width} * element_bytes;
  const auto bytes_of = [&](const TilePlan& tile_plan, int64_t vectors) {
    return shared_layout(tile_plan.mapping, channels_per_tile(tile_plan)).vectors +
           vectors * tensors * kThreads * vector_bytes;
  };
  // A team is `parts` blocks for each piece.
  const auto fits = [&](const TilePlan& tile_plan, int64_t parts, int64_t share) {
    return bytes_of(tile_plan, ceil_div(ceil_div(tile_plan.length, parts), tile_plan.rows)) <=
           share;
  };
  const auto take = [&](Path path, const TilePlan& tile_plan, int64_t parts) {
    plan.tile_plan = tile_plan;
    split(&plan.tile_plan, parts);
    plan.path = path == Path::Cluster && plan.tile_plan.chunks == 1 ? Path::Block : path;
    plan.teams = plan.tile_plan.tiles;
    plan.vectors = static_cast<int>(plan.tile_plan.chunk_length / plan.tile_plan.rows);
    plan.shared_bytes = static_cast<int>(bytes_of(plan.tile_plan, plan.vectors));
  };

  // Teams as small as the share allows, or as large as fills the device.
  const int64_t largest_team = wanted.may_be(Path::Cluster) ? device.max_cluster : 1;
  for (const int64_t share : shares) {
    for (int columns = widest; columns >= least; columns /= 2) {
      if (!wanted.may_be(Path::Block) && !wanted.may_be(Path::Cluster)) break;
      const TilePlan tile_plan = plan_tiles(shape, element_bytes, aligned, columns);
      const int64_t largest = largest_team / tile_plan.pieces;
      int64_t parts = filling(tile_plan, int64_t{device.multiprocessors} * kShares);
      if (parts * tile_plan.pieces < 2 && !wanted.may_be(Path::Block)) parts = 2;
      if (parts > largest) parts = largest;
      if (parts == 0) break;
      while (parts < largest && !fits(tile_plan, parts, share)) ++parts;
      if (fits(tile_plan, parts, share)) {
        take(parts * tile_plan.pieces > 1 ? Path::Cluster : Path::Block, tile_plan, parts);
        const int blocks = static_cast<int>(plan.tile_plan.chunks);
        if (co_resident(plan.tile_plan, plan.path, blocks, plan.shared_bytes) > 0) return plan;
      }
      if (!last) break;
    }
  }
  if (!device.cooperative || !wanted.may_be(Path::Grid)) {
    return refuse("the tensor is larger than blocks that share their memory hold");
  }
  for (const int64_t share : shares) {
    const int64_t vectors =
        (share - bytes_of(narrowest, 0)) / (int64_t{tensors} * kThreads * vector_bytes);
    if (vectors < 1) continue;
    const int64_t needed = ceil_div(narrowest.length, vectors * narrowest.rows);
    take(Path::Grid, narrowest, needed);
    const int64_t blocks = co_resident(plan.tile_plan, Path::Grid, 1, plan.shared_bytes);
    const int64_t parts = filling(narrowest, blocks);
    if (parts > needed) take(Path::Grid, narrowest, parts);
    if (plan.teams > blocks / plan.tile_plan.chunks) plan.teams = blocks / plan.tile_plan.chunks;
    if (plan.teams > 0) return plan;
  }
  return refuse("a group of channels is larger than the shared memory of the device");
}

}  // namespace cuda
}  // namespace bnorm_ext
