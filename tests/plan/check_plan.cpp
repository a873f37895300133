// Whether plan.h and walk.cuh cover a tensor: every element exactly once, each access aligned,
// limits respected. Small tensors are walked whole, huge ones at the places where 32 bits would not
// do.
//
// Resident plans besides: the limits of every generation of devices, teams that fit, one slot of
// shared memory for each vector.
//
// Prints one line per failure and the number of plans that were checked.
#include <cstdio>
#include <random>
#include <vector>

#include "walk.cuh"

using namespace bnorm_ext;
using namespace bnorm_ext::cuda;

namespace {

int failures = 0;
int paths[4] = {};  // how often each was the best one

void fail(const Shape& s, int bytes, const char* what) {
  if (++failures > 20) return;
  std::printf("N=%lld C=%lld S=%lld %s, %d bytes: %s\n", static_cast<long long>(s.N),
              static_cast<long long>(s.C), static_cast<long long>(s.S),
              s.layout == Layout::ChannelsLast ? "last" : "first", bytes, what);
}

// The channel that a flat offset belongs to.
int64_t channel_of(const Shape& s, int64_t offset) {
  return s.layout == Layout::ChannelsLast ? offset % s.C : offset / s.S % s.C;
}

void check_limits(const Shape& s, int bytes, bool aligned, const WalkPlan& plan) {
  const int full = kVectorBytes / bytes;
  const int64_t inner = s.layout == Layout::ChannelsLast ? s.C : s.S;
  if (plan.width != (aligned && inner % full == 0 ? full : 1)) fail(s, bytes, "width");
  if (plan.columns < 1 || plan.columns > 32 || kThreads % plan.columns != 0 ||
      plan.rows * plan.columns != kThreads) {
    fail(s, bytes, "columns and rows");
  }
  if (plan.chunks < 1 || (plan.chunks - 1) * plan.chunk_length >= plan.length ||
      plan.chunks * plan.chunk_length < plan.length) {
    fail(s, bytes, "chunks");
  }
  if (plan.blocks() > INT32_MAX) fail(s, bytes, "more blocks than a grid has");
  const int64_t shared = int64_t{kThreads} / 32 * channels_per_tile(plan, s.layout) * 16;
  if (shared > 48 * 1024) fail(s, bytes, "more shared memory than a block has by default");
}

template <int kWidth, bool kLast>
void walk_whole(const Shape& s, int bytes, const WalkPlan& plan) {
  std::vector<uint8_t> seen(static_cast<size_t>(s.numel()));
  for (int64_t block = 0; block < plan.blocks(); ++block) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
      Walk<kWidth, kLast> walk(s, plan, block);
      if (walk.remaining > 0 && walk.channel >= s.C) return fail(s, bytes, "no such channel");
      walk.batches(plan, [&](const int64_t (&at)[kBatch], int valid) {
        for (int u = 0; u < valid; ++u) {
          if (at[u] % kWidth != 0 || at[u] < 0 || at[u] + kWidth > s.numel()) {
            return fail(s, bytes, "an access that is not aligned or outside");
          }
          for (int v = 0; v < kWidth; ++v) {
            const int64_t channel = walk.channel + (kLast ? v : 0);
            if (channel_of(s, at[u] + v) != channel) fail(s, bytes, "another channel's value");
            ++seen[static_cast<size_t>(at[u] + v)];
          }
        }
      });
    }
  }
  for (const uint8_t count : seen) {
    if (count != 1) return fail(s, bytes, "an element that is not taken exactly once");
  }
}

// The first two and the last vector of some threads, against the definition of the layout.
template <int kWidth, bool kLast>
void walk_some(const Shape& s, int bytes, const WalkPlan& plan) {
  for (const int64_t block : {int64_t{0}, plan.blocks() / 2, plan.blocks() - 1}) {
    for (const unsigned t : {0u, 77u, 255u}) {
      threadIdx.x = t;
      Walk<kWidth, kLast> walk(s, plan, block);
      int64_t index = walk.chunk * plan.chunk_length + walk.row;
      for (int step = 0; step < 100 && walk.remaining > 0; ++step) {
        const __int128 row = kLast ? index : index * kWidth / s.S;
        const __int128 right = kLast ? row * s.C + walk.channel
                                     : (row * s.C + walk.channel) * s.S + index * kWidth % s.S;
        if (walk.offset != right) return fail(s, bytes, "a wrong offset in a huge tensor");
        walk.advance(plan);
        index += plan.rows;
      }
    }
  }
}

template <int kWidth>
void check_width(const Shape& s, int bytes, const WalkPlan& plan, bool whole) {
  if (s.layout == Layout::ChannelsLast) {
    whole ? walk_whole<kWidth, true>(s, bytes, plan) : walk_some<kWidth, true>(s, bytes, plan);
  } else {
    whole ? walk_whole<kWidth, false>(s, bytes, plan) : walk_some<kWidth, false>(s, bytes, plan);
  }
}

struct Generation {
  const char* name;
  DeviceLimits limits;
};
// As the CUDA programming guide has them per compute capability.
const Generation kGenerations[] = {
    {"sm_75", {40, 64 << 10, 64 << 10, 1, true}},
    {"sm_80", {108, 164 << 10, 163 << 10, 1, true}},
    {"sm_86", {82, 100 << 10, 99 << 10, 1, true}},
    {"sm_90", {132, 228 << 10, 227 << 10, kLargestCluster, true}},
    {"sm_100", {148, 228 << 10, 227 << 10, kLargestCluster, true}},
    {"sm_120", {170, 100 << 10, 99 << 10, kLargestCluster, true}},
    {"no clusters, no cooperation", {8, 164 << 10, 163 << 10, 1, false}},
};

void check_resident(const Shape& s, int bytes, int tensors, const DeviceLimits& device,
                    const ResidentPlan& plan, bool whole) {
  if (plan.path == Path::TwoPass) {
    if (plan.reason[0] == '\0') fail(s, bytes, "no reason for two passes");
    return;
  }
  const WalkPlan& walk = plan.walk;
  const int64_t team = walk.chunks;
  check_limits(s, bytes, /*aligned=*/true, walk);
  if (walk.width * bytes != kVectorBytes) fail(s, bytes, "narrow accesses on chip");
  if (plan.shared_bytes > device.shared_per_block)
    fail(s, bytes, "more shared memory than there is");
  const SharedLayout shared = shared_layout(channels_per_tile(walk, s.layout));
  if (shared.team % 16 != 0 || shared.table % 16 != 0 || shared.vectors % 16 != 0 ||
      shared.table < shared.team + channels_per_tile(walk, s.layout) * 16 ||
      plan.shared_bytes < shared.vectors + int64_t{tensors} * plan.vectors * kThreads * 16) {
    fail(s, bytes, "shared memory that overlaps");
  }
  if (int64_t{plan.vectors} * walk.rows < walk.chunk_length) fail(s, bytes, "too few slots");
  const int64_t held = ByLimits{device}(plan.path, static_cast<int>(team), plan.shared_bytes);
  switch (plan.path) {
    case Path::Block:
      if (team != 1 || plan.teams != walk.tiles || held < 1) fail(s, bytes, "not one block");
      break;
    case Path::Cluster:
      if (team < 2 || team > device.max_cluster || plan.teams != walk.tiles || held < 1) {
        fail(s, bytes, "a cluster that there is not");
      }
      break;
    default:
      // All blocks at once, or a barrier of a team waits for ever.
      if (!device.cooperative || plan.teams < 1 || plan.teams > walk.tiles ||
          plan.blocks() > held) {
        fail(s, bytes, "a grid that is not resident");
      }
  }
  switch (walk.width) {
    case 4:
      return check_width<4>(s, bytes, walk, whole);
    default:
      return check_width<8>(s, bytes, walk, whole);
  }
}

int check_residency(const Shape& s) {
  int plans = 0;
  for (const int bytes : {2, 4}) {
    for (const int tensors : {1, 2}) {
      for (const Generation& g : kGenerations) {
        for (const Wanted& wanted :
             {Wanted{}, Wanted{false, Path::TwoPass}, Wanted{false, Path::Block},
              Wanted{false, Path::Cluster}, Wanted{false, Path::Grid}}) {
          const ResidentPlan plan =
              plan_resident(s, bytes, true, tensors, g.limits, ByLimits{g.limits}, wanted);
          const bool as_wanted = wanted.any || plan.path == wanted.path || plan.walk.chunks == 1 ||
                                 plan.path == Path::TwoPass;
          if (!as_wanted) fail(s, bytes, "another path than was asked for");
          if (wanted.any || !as_wanted) ++paths[static_cast<int>(plan.path)];
          check_resident(s, bytes, tensors, g.limits, plan, wanted.any && s.numel() <= 40000);
          ++plans;
        }
        // A device that holds nothing of what it is asked to hold.
        const ResidentPlan none = plan_resident(s, bytes, true, tensors, g.limits,
                                                [](Path, int, int) { return int64_t{0}; });
        if (none.path != Path::TwoPass) fail(s, bytes, "resident where nothing is");
      }
    }
  }
  return plans;
}

int check(const Shape& s) {
  int plans = 0;
  const bool whole = s.numel() <= 40000;
  for (const int bytes : {2, 4, 8}) {
    for (const bool aligned : {true, false}) {
      for (const int multiprocessors : {1, 4, 132}) {
        DeviceLimits device;
        device.multiprocessors = multiprocessors;
        const WalkPlan plan = plan_two_pass(s, bytes, aligned, device);
        check_limits(s, bytes, aligned, plan);
        switch (plan.width) {
          case 1:
            check_width<1>(s, bytes, plan, whole);
            break;
          case 2:
            check_width<2>(s, bytes, plan, whole);
            break;
          case 4:
            check_width<4>(s, bytes, plan, whole);
            break;
          default:
            check_width<8>(s, bytes, plan, whole);
        }
        ++plans;
      }
    }
  }
  return plans;
}

}  // namespace

int main() {
  int plans = 0;
  std::mt19937_64 random(0);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (const Layout layout : {Layout::ChannelsFirst, Layout::ChannelsLast}) {
    for (int i = 0; i < 500; ++i) {
      // Log-uniform sizes, half of them multiples of 8, so that vectors and odd rests both occur.
      const int64_t limit[] = {64, 128, 512};
      int64_t size[3];
      for (int k = 0; k < 3; ++k) {
        size[k] = 1 + below(1 + below(limit[k]));
        if (below(2) == 0) size[k] = (size[k] + 7) / 8 * 8;
      }
      while (size[0] * size[1] * size[2] > 40000) size[below(3)] = 1 + below(8);
      plans += check({size[0], size[1], size[2], layout});
      plans += check_residency({size[0], size[1], size[2], layout});
      // As large as layers of nets are, and larger.
      plans +=
          check_residency({1 + below(256), 16 * (1 + below(128)), 16 * (1 + below(3136)), layout});
    }
    const int64_t huge = int64_t{1} << 31;
    for (const Shape& s : {Shape{1, 1, huge + 24, layout}, Shape{huge / 64 + 1, 128, 49, layout},
                           Shape{70000, 64, 3136, layout}, Shape{huge, 2, 1, layout},
                           Shape{2, 1 << 20, 1056, layout}, Shape{1, 3, huge * 4, layout}}) {
      plans += check(s) + check_residency(s);
    }
  }
  for (const int count : paths) {
    if (count < 100) fail({}, 0, "a path that is hardly ever taken");
  }
  std::printf("%d plans\n", plans);
  return failures == 0 ? 0 : 1;
}
