// Whether the planner chooses by its cost (cost.h), and whether that behaves: no plan is predicted to take
// longer than two passes, a tensor twice as large takes no less on the same path, and the contributions
// are those that a hand calculation gives.
//
// Prints one line per failure and the number of plans that were checked.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>

#include "resident_plan.h"

using namespace bnorm_ext;
using namespace bnorm_ext::cuda;

namespace {

int failures = 0, plans = 0;
int paths[4] = {}, two_passes_for_speed = 0;

void fail(const Shape& s, int bytes, int tensors, const char* gpu, const char* what) {
  if (++failures > 20) return;
  std::printf("N=%lld C=%lld S=%lld %s, %d bytes, %d read, %s: %s\n", static_cast<long long>(s.N),
              static_cast<long long>(s.C), static_cast<long long>(s.S),
              s.layout == Layout::ChannelsLast ? "last" : "first", bytes, tensors, gpu, what);
}

struct Gpu {
  const char* name;
  DeviceLimits limits;
};
constexpr int kKb = 1 << 10, kMb = 1 << 20;
// From data sheets: multiprocessors, shared memory of one and of a block, clusters, L2, GB/s, MHz.
const Gpu kGpus[] = {
    {"T4", {40, 64 * kKb, 64 * kKb, 1, true, false, 4 * kMb, 320, 1590}},
    {"A100", {108, 164 * kKb, 163 * kKb, 1, true, false, 40 * kMb, 2039, 1410}},
    {"RTX 3090", {82, 100 * kKb, 99 * kKb, 1, true, false, 6 * kMb, 936, 1695}},
    {"RTX 4090", {128, 100 * kKb, 99 * kKb, 1, true, false, 72 * kMb, 1008, 2520}},
    {"L4", {58, 100 * kKb, 99 * kKb, 1, true, false, 48 * kMb, 300, 2040}},
    {"H200", {132, 228 * kKb, 227 * kKb, kLargestCluster, true, false, 60 * kMb, 4800, 1980}},
    {"B200", {148, 228 * kKb, 227 * kKb, kLargestCluster, true, false, 126 * kMb, 8000, 1965}},
    {"RTX 5090", {170, 100 * kKb, 99 * kKb, kLargestCluster, true, false, 96 * kMb, 1792, 2407}},
    {"H100, beside collectives",
     {132, 228 * kKb, 227 * kKb, kLargestCluster, true, true, 50 * kMb, 3350, 1980}},
    {"no rates", {132, 228 * kKb, 227 * kKb, kLargestCluster, true}},
};

struct Planned {
  ResidentPlan plan;
  double time;
};
Planned planned(const Shape& s, int bytes, bool aligned, int tensors, const DeviceLimits& d) {
  const ByLimits held{d, tensors};
  const ResidentPlan plan = plan_resident(s, bytes, aligned, tensors, d, held);
  ++plans;
  const int64_t at_once = plan.path == Path::TwoPass
                              ? 0
                              : held(plan.tile_plan, plan.path,
                                     static_cast<int>(plan.tile_plan.chunks), plan.shared_bytes);
  return {plan, predicted(plan, s, bytes, aligned, tensors, d, at_once).total()};
}

void check_two_passes(const Shape& s, int bytes, bool aligned, int tensors, const Gpu& gpu) {
  const Planned found = planned(s, bytes, aligned, tensors, gpu.limits);
  const double two = predicted(two_passes(""), s, bytes, aligned, tensors, gpu.limits, 0).total();
  if (!(found.time > 0) || !std::isfinite(found.time)) fail(s, bytes, tensors, gpu.name, "no time");
  if (found.time > two * (1 + 1e-9)) {
    fail(s, bytes, tensors, gpu.name, "slower than two passes, as predicted");
  }
  ++paths[static_cast<int>(found.plan.path)];
  two_passes_for_speed +=
      found.plan.path == Path::TwoPass &&
      found.plan.reason == std::string("one launch is predicted to take longer");
}

// Each of the sizes is doubled, again and again. Between two such sizes the time may fall: a tensor that is
// just large enough for one more block per channel has more blocks. So it may where accesses become wider
// or channels are grouped in another way,
// and where blocks need so much shared memory that each has a multiprocessor to itself.
void check_monotone(const Shape& start, int bytes, int tensors, const Gpu& gpu) {
  for (int64_t Shape::* size : {&Shape::N, &Shape::C, &Shape::S}) {
    double before[4] = {};
    int width = 0, shared = 0;
    Shape s = start;
    for (; static_cast<double>(s.numel()) * bytes < 4e9; s.*size *= 2) {
      const Planned found = planned(s, bytes, true, tensors, gpu.limits);
      const TilePlan tiles = plan_tiles(s, bytes, true);
      const int columns = tiles.mapping == Mapping::ChannelGroups ? tiles.columns : 0;
      const int now = tiles.width + 16 * columns;
      const int of_block = found.plan.vectors > 0 ? sharing(found.plan, gpu.limits) : 0;
      if (now != width || of_block != shared) before[0] = before[1] = before[2] = before[3] = 0;
      width = now;
      shared = of_block;
      double& last = before[static_cast<int>(found.plan.path)];
      if (found.time < last * (1 - 1e-9)) {
        fail(s, bytes, tensors, gpu.name, "faster than half of it on the same path");
      }
      last = found.time;
    }
  }
}

bool near(double a, double b) {
  return std::fabs(a - b) <= 1e-6 * std::fabs(b);
}

// An H200 reads and writes 4.2e6 bytes in a microsecond, and starts 7,920 warps of instructions on each of
// its 132 multiprocessors.
void check_by_hand() {
  const Gpu& gpu = kGpus[5];
  // float32, channels_last: 64 tiles of 32 channels, of 4 blocks each. Sweeps read x, and from memory what
  // 0.31 of the L2 does not hold, and write y.
  Shape s{64, 2048, 196, Layout::ChannelsLast};
  const double tensor = 64. * 2048 * 196 * 4;
  Planned found = planned(s, 4, true, 1, gpu.limits);
  const ResidentPlan& plan = found.plan;
  Cost cost = cost_of(plan, s.numel(), 4, 1, gpu.limits, 264);
  if (plan.path != Path::Grid || plan.blocks() > 264 ||
      !near(cost.memory, (3 * tensor - 0.31 * 60 * kMb) / 4.2e6) ||
      !near(cost.waiting, 3.1 + 3 + 2.5 + 1.3) || cost.latency != 0 || cost.instructions != 0) {
    fail(s, 4, 1, gpu.name, "sweeps are not as counted by hand");
  }
  // In two passes a second launch, and the merge of partial sums in place of the team's.
  cost = predicted(two_passes(""), s, 4, true, 1, gpu.limits, 0);
  if (!near(cost.memory, (3 * tensor - 0.31 * 60 * kMb) / 4.2e6) ||
      !near(cost.waiting, 2 * (3.1 + 3) + 3.6)) {
    fail(s, 4, 1, gpu.name, "two passes are not as counted by hand");
  }
  // bfloat16, 16x16 positions: 1024 channels of 2048 vectors, 8 for each thread of a block. 256 blocks at
  // once take 4 rounds; 7 instructions for each element, in backward, of two blocks' tiles in each.
  s = {64, 1024, 256, Layout::ChannelsFirst};
  found = planned(s, 2, true, 2, gpu.limits);
  double bytes = 64. * 1024 * 256 * 2 * 3;
  cost = cost_of(found.plan, s.numel(), 2, 2, gpu.limits, 0);
  const double elements = 4 * 2 * 8 * 8 * 256;
  if (found.plan.path != Path::Block || found.plan.vectors != 8 || found.plan.teams != 256 ||
      !near(cost.memory, bytes / 4.2e6) || !near(cost.instructions, 7 * elements / 32 / 7920) ||
      !near(cost.waiting, 3.1 + 3 + 2.5 * 4)) {
    fail(s, 2, 2, gpu.name, "a plan on chip is not as counted by hand");
  }
  // float32, 112x112 positions: 64 channels, for teams of 44 blocks. 9 of them fit where three blocks share
  // a multiprocessor, and 8 rounds are enough for 8 teams. All but the first one hide half a microsecond.
  s = {64, 64, 12544, Layout::ChannelsFirst};
  const Wanted grid{false, Path::Grid};
  ResidentPlan large = plan_resident(s, 4, true, 1, gpu.limits, ByLimits{gpu.limits, 1}, grid);
  bytes = 64. * 64 * 12544 * 4 * 2;
  cost = cost_of(large, s.numel(), 4, 1, gpu.limits, 0);
  if (large.tile_plan.chunks != 44 || large.teams != 8 || !near(cost.memory, bytes / 4.2e6) ||
      !near(cost.waiting, 3.1 + 3 + (2.5 + 1.3) * 8 - 0.5 * 7)) {
    fail(s, 4, 1, gpu.name, "a third block of a multiprocessor is not as counted by hand");
  }
  // Backward in teams of more than 72 blocks, of which there are two at once: two barriers in each of 32.
  s = {256, 64, 12544, Layout::ChannelsFirst};
  large = plan_resident(s, 2, true, 2, gpu.limits, ByLimits{gpu.limits, 2}, grid);
  cost = cost_of(large, s.numel(), 2, 2, gpu.limits, 0);
  if (large.tile_plan.chunks <= 72 || large.teams != 2 ||
      !near(cost.waiting, 3.1 + 3 + (2.5 + 2 * 1.3) * 32)) {
    fail(s, 2, 2, gpu.name, "a second barrier is not as counted by hand");
  }
  // bfloat16, 2-byte accesses of few blocks: 8 of each thread are in flight for 0.7 us.
  s = {9, 3, 1001, Layout::ChannelsLast};
  found = planned(s, 2, false, 1, gpu.limits);
  const auto threads = static_cast<double>(found.plan.blocks()) * kThreads;
  cost = cost_of(found.plan, s.numel(), 2, 1, gpu.limits, 264);
  const double values = 9. * 3 * 1001;
  if (!near(cost.latency + cost.instructions, 3 * values / (threads * 8 / 0.7))) {
    fail(s, 2, 1, gpu.name, "loads in flight are not as counted by hand");
  }
}

}  // namespace

int main() {
  check_by_hand();
  std::mt19937_64 random(0);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (const Layout layout : {Layout::ChannelsFirst, Layout::ChannelsLast}) {
    for (const Gpu& gpu : kGpus) {
      for (const int bytes : {2, 4}) {
        for (const int tensors : {1, 2}) {
          for (int i = 0; i < 400; ++i) {
            const bool net = i % 2 == 0;  // as large as layers of nets; or of any size
            const Shape s =
                net ? Shape{1 + below(256), 8 * (1 + below(256)), 1 + below(12544), layout}
                    : Shape{1 + below(1 + below(512)), 1 + below(1 + below(512)),
                            1 + below(1 + below(4096)), layout};
            check_two_passes(s, bytes, i % 5 != 0, tensors, gpu);
          }
          for (const int64_t C : {8, 24, 64, 960}) {
            for (const int64_t S : {1, 15, 49, 196, 784}) {
              check_monotone({1, C, S, layout}, bytes, tensors, gpu);
              check_monotone({3, C, S, layout}, bytes, tensors, gpu);
            }
          }
        }
      }
    }
  }
  for (const int count : paths) {
    if (count < 100) fail({}, 0, 0, "any", "a path that is hardly ever taken");
  }
  if (two_passes_for_speed < 100) fail({}, 0, 0, "any", "two passes are never taken to be faster");
  std::printf("%d plans, %d in two passes since these are predicted to be faster\n", plans,
              two_passes_for_speed);
  return failures == 0 ? 0 : 1;
}
