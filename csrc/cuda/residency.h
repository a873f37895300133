// How a call is carried out (a plan, which resident_plan.h makes), and the shared memory of its blocks. What
// the kernels and the planner both need, in plain C++ like plan.h.
//
// Paths
//   TwoPass  two launches. The first one adds up, and the last blocks of a tile to arrive merge the
//            partial sums; the second one reads everything again and writes
//   Block    one launch; a team is one block, which needs no other
//   Cluster  one launch; a team is a thread block cluster, whose blocks exchange partial sums through
//            their shared memory (sm_90 and newer). Not in ChannelsLast
//   Grid     one cooperative launch; a team is some of its blocks, which exchange partial sums through
//            global memory. Not beside collectives
//
// Where the tensor is between the sums and the writing
//   ChannelsFirst, ChannelGroups   on chip: a team keeps its tile in shared memory, and reads it once.
//            Where there are more tiles than teams at once, each team takes one tile after the other.
//   ChannelsLast                   not on chip: a team sweeps over its tile twice, forward to add up and
//            backward to write, so that what it has read last comes from the L2. Each tile has its team.
#pragma once

#include "plan.h"

namespace bnorm_ext {
namespace cuda {

enum class Path : int8_t { TwoPass, Block, Cluster, Grid };

// Blocks of a cluster, at most. More than 8 are not portable: a kernel has to opt in, and a device
// may have no place for such a cluster.
constexpr int kLargestCluster = 16;

// `reason` says why the path is TwoPass.
struct ResidentPlan {
  Path path = Path::TwoPass;
  const char* reason = "";
  TilePlan tile_plan;    // its chunks are the blocks of a team
  int64_t teams = 0;     // that are launched, perhaps fewer than tiles (not in ChannelsLast)
  int vectors = 0;       // per thread, of each tensor that stays on chip; 0: none stays
  int apart = kThreads;  // from a thread's vector on chip to its next one, in vectors
  int shared_bytes = 0;  // per block

  int64_t blocks() const { return teams * tile_plan.chunks; }
};

// Byte offsets in a block's shared memory, all multiples of 16.
struct SharedLayout {
  int team;     // [2, channels] sums that the team exchanges; before them those of the block
  int table;    // constants of the tile's channels, kTableBytes whatever its width
  int vectors;  // [tensors, vectors, threads_with_vectors] of 16 bytes, or of one value, each
};
constexpr int kTableRows = 5;
constexpr int kTableBytes = kTableRows * kWideColumns * 8 * 4;
static_assert(kMostGrouped <= kWideColumns, "in ChannelGroups a row of the table is a group");
BNORM_HOST_DEVICE constexpr SharedLayout shared_layout(Mapping mapping, int channels) {
  const int team = reduce_shared_bytes(mapping, channels), table = team + 2 * channels * kPairBytes;
  return {team, table, table + kTableBytes};
}

// The first so many threads of a block have vectors: all of them, except in ChannelGroups.
inline int threads_with_vectors(const TilePlan& plan) {
  return plan.rows * plan.columns;
}

// Bytes of the largest element type that the resident kernels are compiled for.
constexpr int kWidestOnChip = 4;

// The resident kernels are compiled for at least this many blocks per multiprocessor, so that one
// block loads while another one computes or stores.
constexpr int kShares = 2;
// Kernels that take fewer registers than that allows are given a third block, where it shortens a call.
constexpr int kMostShares = kShares + 1;
constexpr int kReservedBytes = 1024;  // of shared memory per block, reserved by the driver

// Blocks of a team of a grid, at most, where every block adds up what all of them have found. In
// larger teams each adds up a part of it, which takes a second barrier but reads little: all of it is
// (blocks of the team)^2 times a block's sums.
constexpr int kAddedByAll = 72;

}  // namespace cuda
}  // namespace bnorm_ext
