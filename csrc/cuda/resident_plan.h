// In how many launches a tensor is worked on, whether it stays on chip between the statistics and the
// writing, and how it is distributed: the plan of least predicted time (cost.h). Decided from sizes, device
// limits and how many blocks the runtime says are resident at once, in plain C++ like plan.h.
#pragma once

#include "cost.h"

namespace bnorm_ext {
namespace cuda {

// How many blocks of a kernel, or how many of its clusters, a device holds at once, estimated from
// its limits. Where there is a device, the CUDA runtime is asked instead. `tensors`: as for plan_on_chip.
struct ByLimits {
  DeviceLimits device;
  int tensors = 2;
  // What registers allow. As compiled for sm_90, kernels without an epilogue take few of them in forward
  // and for 32-bit values, where a thread has the sums of one channel.
  int most(const TilePlan& plan) const {
    const bool takes_few = plan.mapping == Mapping::ChannelsFirst && plan.width > 1 &&
                           (tensors == 1 || plan.width * 4 == kVectorBytes);
    return takes_few ? kMostShares : kShares;
  }
  int64_t operator()(const TilePlan& plan, Path path, int team, int shared_bytes) const {
    const int64_t fit = device.shared_per_multiprocessor / (int64_t{shared_bytes} + kReservedBytes);
    const int64_t blocks = device.multiprocessors * (fit < most(plan) ? fit : most(plan));
    return path == Path::Cluster ? blocks / team : blocks;
  }
};

// Which path is wanted: any, which gives the best one; or a given one where that is possible, for
// tests and measurements. A team is one block where a tile is no more than one block's work.
struct Wanted {
  bool any = true;
  Path path = Path::TwoPass;
  bool may_be(Path p) const { return any || path == p; }
};

inline ResidentPlan two_passes(const char* reason) {
  ResidentPlan plan;
  plan.reason = reason;
  return plan;
}

// What a plan takes. at_once: how many blocks of one launch run at once.
inline Cost predicted(const ResidentPlan& plan, const Shape& shape, int element_bytes, bool aligned,
                      int tensors, const DeviceLimits& device, int64_t at_once) {
  if (plan.path != Path::TwoPass) {
    return cost_of(plan, shape.numel(), element_bytes, tensors, device, at_once);
  }
  const TilePlan walk = plan_two_pass(shape, element_bytes, aligned, device);
  return cost_of_two_passes(walk, shape.numel(), element_bytes, tensors, device);
}

// A cooperative launch cannot end before all its blocks have started. While kernels of a collective
// hold multiprocessors, it waits for them; meanwhile they, and whatever the other ranks do after
// them, wait for it. Fewer blocks would not help for certain: the device spreads them over all
// multiprocessors, and how much of one a collective's block needs is not known.
constexpr const char* kBesideCollectives =
    "a cooperative grid and the collectives of other processes would wait for each other";

// Two passes in place of a plan in one launch, where they are predicted to be faster.
inline ResidentPlan or_two_passes(const ResidentPlan& plan, const Shape& shape, int element_bytes,
                                  bool aligned, int tensors, const DeviceLimits& device,
                                  int64_t at_once) {
  const auto time = [&](const ResidentPlan& p) {
    return predicted(p, shape, element_bytes, aligned, tensors, device, at_once).total();
  };
  const ResidentPlan two = two_passes("one launch is predicted to take longer");
  return time(two) < time(plan) ? two : plan;
}

// The plan of ChannelsLast, where nothing stays on chip: all blocks sweep over the tensor twice.
// co_resident(tile_plan, path, team, shared_bytes): how many clusters of `team` blocks, or for
// other paths how many blocks, the device holds at once.
template <typename CoResident>
ResidentPlan plan_sweeps(const Shape& shape, int element_bytes, bool aligned, int tensors,
                         const DeviceLimits& device, CoResident co_resident,
                         const Wanted& wanted = {}) {
  ResidentPlan plan;
  plan.path = Path::Grid;
  TilePlan& tiles = plan.tile_plan;
  tiles = plan_two_pass(shape, element_bytes, aligned, device);
  plan.shared_bytes = shared_layout(tiles.mapping, channels_per_tile(tiles)).vectors;
  plan.teams = tiles.tiles;
  const int64_t blocks = co_resident(tiles, Path::Grid, 1, plan.shared_bytes);
  if (blocks == 0) return two_passes("the device has no room for a block");
  int64_t parts = filling(tiles, blocks);
  if (!wanted.any && wanted.path == Path::Block) parts = 1;
  if (parts == 1) {
    plan.path = Path::Block;
  } else if (!wanted.may_be(Path::Grid)) {
    return two_passes("in channels_last blocks work alone or in a grid");
  } else if (!device.cooperative) {
    return two_passes("the device has no cooperative launches");
  } else if (device.beside_collectives && wanted.any) {
    return two_passes(kBesideCollectives);
  }
  split(&tiles, parts);
  sweep(&tiles, shape);
  if (!wanted.any) return plan;
  return or_two_passes(plan, shape, element_bytes, aligned, tensors, device, blocks);
}

// The plan for a kernel that keeps `tensors` tensors of x's shape on chip (1 forward, 2 backward).
// co_resident as for plan_sweeps.
template <typename CoResident>
ResidentPlan plan_on_chip(const Shape& shape, int element_bytes, bool aligned, int tensors,
                          const DeviceLimits& device, CoResident co_resident,
                          const Wanted& wanted) {
  ResidentPlan plan;
  const TilePlan tile_plan = plan_tiles(shape, element_bytes, aligned);
  const int64_t full = device.shared_per_block;
  // Of the shared memory, what each of so many blocks of a multiprocessor can have.
  const auto share_of = [&](int blocks) {
    const int64_t share = device.shared_per_multiprocessor / blocks - kReservedBytes;
    return share < full ? share : full;
  };
  const int64_t shares[] = {share_of(kShares), full};
  const int64_t vector_bytes = int64_t{tile_plan.width} * element_bytes;
  const auto bytes_of = [&](int64_t vectors) {
    return shared_layout(tile_plan.mapping, channels_per_tile(tile_plan)).vectors +
           vectors * tensors * threads_with_vectors(tile_plan) * vector_bytes;
  };
  // A team has `parts` blocks for each piece.
  const auto fits = [&](int64_t parts, int64_t share) {
    return bytes_of(ceil_div(ceil_div(tile_plan.length, parts), tile_plan.rows)) <= share;
  };
  const auto take = [&](Path path, int64_t parts) {
    plan.tile_plan = tile_plan;
    split(&plan.tile_plan, parts);
    plan.path = path == Path::Cluster && plan.tile_plan.chunks == 1 ? Path::Block : path;
    plan.teams = plan.tile_plan.tiles;
    plan.vectors = static_cast<int>(plan.tile_plan.chunk_length / plan.tile_plan.rows);
    plan.apart = threads_with_vectors(plan.tile_plan);
    plan.shared_bytes = static_cast<int>(bytes_of(plan.vectors));
  };

  const auto cost = [&](const ResidentPlan& plan) {
    return predicted(plan, shape, element_bytes, aligned, tensors, device, plan.blocks()).total();
  };

  // Teams that fill the device, or larger ones where the tile does not fit otherwise; or single blocks
  // where that is faster.
  ResidentPlan clusters;
  const int64_t largest_team = wanted.may_be(Path::Cluster) ? device.max_cluster : 1;
  const auto consider = [&](int64_t parts) {
    take(parts * tile_plan.pieces > 1 ? Path::Cluster : Path::Block, parts);
    const int blocks = static_cast<int>(plan.tile_plan.chunks);
    int64_t teams = co_resident(plan.tile_plan, plan.path, blocks, plan.shared_bytes);
    if (plan.path == Path::Block) teams /= blocks;
    if (teams == 0) return false;
    // Where there are more tiles than teams at once, each team takes several, one after the other: it
    // fetches the next one while it writes this one.
    plan.teams = ceil_div(plan.teams, ceil_div(plan.teams, teams));
    if (clusters.teams == 0 || cost(plan) < cost(clusters)) clusters = plan;
    return true;
  };
  for (const int64_t share : shares) {
    if (!wanted.may_be(Path::Block) && !wanted.may_be(Path::Cluster)) break;
    const int64_t largest = largest_team / tile_plan.pieces;
    int64_t parts = filling(tile_plan, int64_t{device.multiprocessors} * kShares);
    if (parts * tile_plan.pieces < 2 && !wanted.may_be(Path::Block)) parts = 2;
    if (parts > largest) parts = largest;
    if (parts == 0) break;
    while (parts < largest && !fits(parts, share)) ++parts;
    if (fits(parts, share) && consider(parts)) break;
  }
  if (wanted.any && tile_plan.pieces == 1 && fits(1, full)) consider(1);
  if (clusters.teams > 0 && !wanted.any) return clusters;
  const auto refuse_unless_clusters = [&](const char* reason) {
    return clusters.teams > 0 ? clusters : two_passes(reason);
  };
  if (!device.cooperative || !wanted.may_be(Path::Grid)) {
    return refuse_unless_clusters(
        "a tile does not fit into the shared memory of a block or a cluster");
  }
  if (device.beside_collectives && wanted.any) return refuse_unless_clusters(kBesideCollectives);
  // Whether a team of blocks with so much shared memory each is possible, which then is `plan`.
  const auto take_grid = [&](int64_t share) {
    const int64_t vectors = (share - bytes_of(0)) / (bytes_of(1) - bytes_of(0));
    if (vectors < 1) return false;
    const int64_t needed = ceil_div(tile_plan.length, vectors * tile_plan.rows);
    take(Path::Grid, needed);
    const int64_t blocks = co_resident(plan.tile_plan, Path::Grid, 1, plan.shared_bytes);
    const int64_t parts = filling(tile_plan, blocks);
    if (parts > needed) take(Path::Grid, parts);
    const int64_t teams = blocks / plan.tile_plan.chunks;
    if (teams == 0) return false;
    plan.teams = ceil_div(plan.teams, ceil_div(plan.teams, teams));
    return true;
  };
  for (const int64_t share : shares) {
    if (!take_grid(share)) continue;
    ResidentPlan grid = plan;
    if (take_grid(share_of(kMostShares)) && cost(plan) < cost(grid)) grid = plan;
    return clusters.teams > 0 && cost(clusters) <= cost(grid) ? clusters : grid;
  }
  return refuse_unless_clusters(
      "a group of channels is larger than the shared memory of the device");
}

// The plan of a call in one launch, forward or backward (`tensors`: 1 or 2); of two where those take less
// time, or where one launch cannot be. co_resident as for plan_sweeps.
template <typename CoResident>
ResidentPlan plan_resident(const Shape& shape, int element_bytes, bool aligned, int tensors,
                           const DeviceLimits& device, CoResident co_resident,
                           const Wanted& wanted = {}) {
  if (!wanted.any && wanted.path == Path::TwoPass) return two_passes("two passes were asked for");
  if (element_bytes > kWidestOnChip) return two_passes("float64 is not kept on chip");
  if (shape.layout == Layout::ChannelsLast) {
    return plan_sweeps(shape, element_bytes, aligned, tensors, device, co_resident, wanted);
  }
  const ResidentPlan plan =
      plan_on_chip(shape, element_bytes, aligned, tensors, device, co_resident, wanted);
  if (!wanted.any || plan.path == Path::TwoPass) return plan;
  return or_two_passes(plan, shape, element_bytes, aligned, tensors, device, plan.blocks());
}

}  // namespace cuda
}  // namespace bnorm_ext
