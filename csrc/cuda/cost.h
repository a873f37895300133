// How long a call takes by its plan, predicted. The planner takes the plan with the least time, and
// explain() prints it. Times are in microseconds.
//
// The model: a kernel adds up, and then it writes. While it moves data it is bound by memory's rate, by
// how many loads are in flight, or by instructions, whichever is slowest. To this is added what all
// blocks wait for: launches, the first loads and the last stores of a launch, and between the sums and
// the writing the sums of a block and of its team.
//   two passes, two sweeps   what is read again comes from the L2 as far as that holds it
//   on chip                  the blocks are in the same phase, so that adding up a tile comes on top of
//                            moving it; and so does the waiting, once for each round of tiles
// Constants that are called fitted are those with which the model is closest to the times of an H200
// (bench/results/cuda-kernels.json). They are taken to be the same on every GPU, which is not yet
// measured. bench/NOTES.md says how far off the model is.
#pragma once

#include "residency.h"

namespace bnorm_ext {
namespace cuda {

// Contributions to the time of a call; in each part of a kernel the slowest one counts.
struct Cost {
  double memory = 0;        // bytes at the rate of a copy
  double latency = 0;       // too few loads in flight for that rate
  double instructions = 0;  // at the rate at which a multiprocessor starts them
  double waiting = 0;       // launches and barriers

  double total() const { return memory + latency + instructions + waiting; }
};

// Rates for a device that does not say its own: those of an H200.
constexpr int kAssumedShare = 36;    // GB/s of memory for each multiprocessor
constexpr int kAssumedClock = 1980;  // MHz
// Of the bandwidth in a data sheet, what a copy of a large tensor reaches; measured on an H200.
constexpr double kCopyShare = 0.875;
inline double copy_rate(const DeviceLimits& device) {  // bytes per microsecond
  const int known = device.gigabytes_per_second;
  return 1000. * kCopyShare * (known > 0 ? known : kAssumedShare * device.multiprocessors);
}
// Warps of instructions that a multiprocessor starts in a microsecond: one for each of four schedulers.
inline double issue_rate(const DeviceLimits& device) {
  return 4. * (device.clock_mhz > 0 ? device.clock_mhz : kAssumedClock);
}

// An empty launch between two events; measured.
constexpr double kLaunch = 3.1;
// In each launch, until the first loads arrive and after the last ones; fitted.
constexpr double kFill = 3.0;
// In each launch, for every wave of blocks that starts when others have ended; fitted.
constexpr double kLaterWave = 2;
// Between the sums and the writing, the sums of a block and the constants of its channels; fitted.
constexpr double kSums = 2.5;
// On top of that in a team: the two barriers of a cluster, measured; that of a grid, fitted, where
// measured are 1.5 to 1.8. The merge between two passes; fitted.
constexpr double kClusterBarrier = 0.4, kGridBarrier = 1.3, kMerge = 3.6;
// What of this two more blocks of a multiprocessor hide, in a grid, after a first round in which all
// wait at the same time; fitted. In clusters, whose barrier is short, a third block was not faster.
constexpr double kHiddenByThree = 0.5;
// What of the L2 is still there of a tensor that has just been read, as a share; measured.
constexpr double kL2Share = 0.31;
// A multiprocessor moves at most so many times its share of memory's rate; fitted.
constexpr double kMostOfShare = 1.5;
// Of a load from memory under load; assumed.
constexpr double kLatency = 0.7;
// Accesses that a thread has in flight: it loads a batch before it uses the last one.
constexpr int kInFlight = 2 * kBatch;

// Instructions for each element of x, in the loops that add up and that write, as compiled for sm_90
// (bench.static). `tensors`: 1 forward, 2 backward. `width`: elements of an access.
struct Instructions {
  double sums, write;
};
constexpr Instructions instructions_of(bool on_chip, int tensors, int width, int element_bytes) {
  const bool forward = tensors == 1;
  if (width == 1) {
    if (on_chip) return forward ? Instructions{8, 31} : Instructions{30, 42};
    return forward ? Instructions{16, 32} : Instructions{28, 46};
  }
  if (element_bytes == 8) return forward ? Instructions{12, 27} : Instructions{19, 35};
  if (element_bytes == 4) {
    if (on_chip) return forward ? Instructions{4, 9} : Instructions{5, 16};
    return forward ? Instructions{9, 8} : Instructions{10, 14};
  }
  if (on_chip) return forward ? Instructions{5, 7} : Instructions{7, 13};
  return forward ? Instructions{8, 7} : Instructions{9, 12};
}

// A part of a kernel in which data is moved: adds the slowest of the three.
inline void add_slowest(Cost* cost, double memory, double latency, double instructions) {
  if (memory >= latency && memory >= instructions) {
    cost->memory += memory;
  } else if (latency >= instructions) {
    cost->latency += latency;
  } else {
    cost->instructions += instructions;
  }
}

// Two passes, or two sweeps in one launch, by `blocks` blocks of which `at_once` run at once.
inline Cost cost_of_reading_twice(const TilePlan& plan, int64_t elements, int element_bytes,
                                  int tensors, const DeviceLimits& device, int64_t blocks,
                                  int64_t at_once) {
  const double tensor = static_cast<double>(elements) * element_bytes;
  const double read = tensors * tensor;
  const double kept = kL2Share * device.l2_bytes;
  const double again = read > kept ? read - kept : 0;
  const auto running = static_cast<double>(blocks < at_once ? blocks : at_once);
  const double busy = running < device.multiprocessors ? running : device.multiprocessors;
  const double in_flight = running * kThreads * kInFlight * plan.width * element_bytes / kLatency;
  const double issue = elements / (kWarp * issue_rate(device) * busy);
  const Instructions count = instructions_of(false, tensors, plan.width, element_bytes);
  Cost cost;
  add_slowest(&cost, read / copy_rate(device), read / in_flight, count.sums * issue);
  add_slowest(&cost, (again + tensor) / copy_rate(device), (read + tensor) / in_flight,
              count.write * issue);
  cost.waiting = kLaunch + kFill + kLaterWave * static_cast<double>(ceil_div(blocks, at_once) - 1);
  return cost;
}

inline Cost cost_of_two_passes(const TilePlan& plan, int64_t elements, int element_bytes,
                               int tensors, const DeviceLimits& device) {
  const int64_t at_once = int64_t{kResident} * device.multiprocessors;
  Cost cost =
      cost_of_reading_twice(plan, elements, element_bytes, tensors, device, plan.blocks(), at_once);
  cost.waiting += cost.waiting + kMerge;
  return cost;
}

// How many blocks of an on-chip plan share a multiprocessor, as far as they hold each other up.
inline int sharing(const ResidentPlan& plan, const DeviceLimits& device) {
  const int64_t fit =
      device.shared_per_multiprocessor / (int64_t{plan.shared_bytes} + kReservedBytes);
  const bool is_alone =
      fit < kShares || (plan.path == Path::Block && plan.blocks() <= device.multiprocessors);
  if (is_alone) return 1;
  const bool are_three =
      fit >= kMostShares && plan.blocks() > int64_t{kShares} * device.multiprocessors;
  return are_three ? kMostShares : kShares;
}

// One launch. at_once: blocks of it that run at once.
inline Cost cost_of(const ResidentPlan& plan, int64_t elements, int element_bytes, int tensors,
                    const DeviceLimits& device, int64_t at_once) {
  const TilePlan& tiles = plan.tile_plan;
  const double barrier = tiles.chunks == 1             ? 0
                         : plan.path == Path::Cluster  ? kClusterBarrier
                         : tiles.chunks <= kAddedByAll ? kGridBarrier
                                                       : 2 * kGridBarrier;
  if (plan.vectors == 0) {
    Cost cost = cost_of_reading_twice(tiles, elements, element_bytes, tensors, device,
                                      plan.blocks(), at_once);
    cost.waiting += kSums + barrier;
    return cost;
  }
  const auto rounds = static_cast<double>(ceil_div(tiles.tiles, plan.teams));
  // Elements of the busiest multiprocessor, as if its threads had work in each round, and their bytes.
  const double of_thread = rounds * plan.vectors * sharing(plan, device) * tiles.width;
  const double share = of_thread * tiles.rows * tiles.columns;
  const double bytes = share * element_bytes * (tensors + 1);
  const double issue = share / (kWarp * issue_rate(device));
  const Instructions count = instructions_of(true, tensors, tiles.width, element_bytes);
  // By 16-byte accesses all of a tile is in flight at once; a value at a time, a batch is.
  const double latency =
      tiles.width > 1 ? 0 : rounds * plan.vectors * (tensors + 1) * kLatency / kBatch;
  Cost cost;
  const double all = static_cast<double>(elements) * element_bytes * (tensors + 1);
  const double busiest = bytes * device.multiprocessors / kMostOfShare;
  add_slowest(&cost, (all > busiest ? all : busiest) / copy_rate(device), latency,
              count.write * issue);
  cost.instructions += count.sums * issue;
  cost.waiting = kLaunch + kFill + rounds * (kSums + barrier);
  if (plan.path == Path::Grid && tiles.chunks > 1 && sharing(plan, device) == kMostShares) {
    cost.waiting -= (rounds - 1) * kHiddenByThree;
  }
  return cost;
}

}  // namespace cuda
}  // namespace bnorm_ext
