// Whether plan.h, resident_plan.h and tile_iterator.cuh cover a tensor: every element exactly once,
// each access aligned, limits respected. Small tensors are visited whole, huge ones at the places
// where 32 bits would not do.
//
// Resident plans are checked too: the limits of every generation of devices, teams that fit, one
// place in shared memory for each vector.
//
// Prints one line per failure and the number of plans that were checked.
#include <cstdio>
#include <random>
#include <vector>

#include "resident_plan.h"
#include "tile_iterator.cuh"

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

// Whether some channels have rows of whole vectors together and one has not.
bool needs_groups(const Shape& s, int bytes) {
  const int full = kVectorBytes / bytes;
  if (s.layout == Layout::ChannelsLast || bytes > 4 || s.S % full == 0) return false;
  if (s.S < full || s.S > kMostGroupedPositions) return false;
  for (int group = 2; group <= 8; group *= 2) {
    if (s.C % group == 0 && group * s.S % full == 0) return true;
  }
  return false;
}

void check_limits(const Shape& s, int bytes, bool aligned, const TilePlan& plan) {
  const int full = kVectorBytes / bytes;
  const bool last = s.layout == Layout::ChannelsLast, grouped = aligned && needs_groups(s, bytes);
  const bool whole = aligned && (last ? s.C : s.S) % full == 0;
  if (plan.width != (whole || grouped ? full : 1)) fail(s, bytes, "width");
  if (plan.mapping != (last      ? Mapping::ChannelsLast
                       : grouped ? Mapping::ChannelGroups
                                 : Mapping::ChannelsFirst)) {
    fail(s, bytes, "mapping");
  }
  if (grouped) {
    const int64_t vectors = plan.group * s.S / full, covered = int64_t{plan.columns} * plan.pieces;
    if (plan.group > kMostGrouped || s.C % plan.group != 0 || plan.group * s.S % full != 0 ||
        (plan.group & (plan.group - 1)) != 0) {
      fail(s, bytes, "group");
    }
    if (covered < vectors || covered - vectors >= plan.pieces || plan.rows < 1 ||
        plan.rows * plan.columns > kThreads || plan.chunks % plan.pieces != 0) {
      fail(s, bytes, "columns, rows and pieces");
    }
  } else if (plan.columns < 1 || plan.columns > 32 || kThreads % plan.columns != 0 ||
             plan.rows * plan.columns != kThreads || plan.pieces != 1) {
    fail(s, bytes, "columns and rows");
  }
  const int64_t parts = plan.chunks / plan.pieces;
  if (parts < 1 || (parts - 1) * plan.chunk_length >= plan.length ||
      (!plan.sweeps && parts * plan.chunk_length < plan.length)) {
    fail(s, bytes, "chunks");
  }
  if (plan.blocks() > INT32_MAX) fail(s, bytes, "more blocks than a grid has");
  if (reduce_shared_bytes(plan) > 48 * 1024) {
    fail(s, bytes, "more shared memory than a block has by default");
  }
}

// A tile has a semaphore for its last block and, where its chunks are merged in two steps, one for each
// kMerged of them; likewise a place for the sums of each chunk and of each merge (tile_sum).
void check_exchange(const Shape& s, int bytes, const TilePlan& plan) {
  const bool in_two_steps = plan.chunks > 2 * kMerged;
  const int64_t merges = in_two_steps ? (plan.chunks - 1) / kMerged + 1 : 0;
  if (semaphores_of(plan) != plan.tiles * (1 + merges)) fail(s, bytes, "a number of semaphores");
  const int64_t places = plan.tiles * (plan.chunks + merges);
  if (plan.chunks > 1 && partials_of(plan) != places * channels_per_tile(plan)) {
    fail(s, bytes, "a number of partial sums");
  }
}

template <int kWidth, Mapping kMapping>
void visit_whole(const Shape& s, int bytes, const TilePlan& plan) {
  using Iterator = TileIterator<kWidth, kMapping>;
  std::vector<uint8_t> seen(static_cast<size_t>(s.numel()));
  const int channels = channels_per_tile(plan);
  for (int64_t block = 0; block < plan.blocks(); ++block) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
      Iterator it(s, plan, static_cast<unsigned>(block));
      if (it.remaining > 0 && it.channel >= s.C) return fail(s, bytes, "no such channel");
      if (kMapping == Mapping::ChannelsLast && it.remaining > 0) {
        const TilePlan back = reversed(plan);
        Iterator from_end = it.at_the_end(plan);
        while (from_end.remaining > 1) from_end.advance(back);
        if (from_end.offset != it.offset) fail(s, bytes, "another way back");
      }
      const auto see = [&](const int64_t (&at)[kBatch], int valid) {
        for (int u = 0; u < valid; ++u) {
          if (at[u] % kWidth != 0 || at[u] < 0 || at[u] + kWidth > s.numel()) {
            return fail(s, bytes, "an access that is not aligned or outside");
          }
          for (int v = 0; v < kWidth; ++v) {
            const int64_t channel = it.channel_of(Iterator::kAlong ? 0 : v);
            if (channel_of(s, at[u] + v) != channel) return fail(s, bytes, "another channel's");
            if (channel / channels != it.tile) return fail(s, bytes, "another tile's channel");
            ++seen[static_cast<size_t>(at[u] + v)];
          }
        }
      };
      // The three ways to take all vectors, in turn.
      struct Nothing {};
      const auto load = [](Nothing&, const int64_t (&)[kBatch], int) {};
      const auto use = [&](const Nothing&, const int64_t (&at)[kBatch], int valid) {
        see(at, valid);
      };
      switch (threadIdx.x % 3) {
        case 0:
          it.template batches<false>(plan, see);
          break;
        case 1:
          it.template batches<true>(plan, see);
          break;
        default:
          it.template pipelined<kBatch, true, Nothing>(plan, load, use);
      }
    }
  }
  for (const uint8_t count : seen) {
    if (count != 1) return fail(s, bytes, "an element that is not taken exactly once");
  }
}

// The first two and the last vector of some threads, against the definition of the layout.
template <int kWidth, Mapping kMapping>
void visit_some(const Shape& s, int bytes, const TilePlan& plan) {
  using Iterator = TileIterator<kWidth, kMapping>;
  for (const int64_t block : {int64_t{0}, plan.blocks() / 2, plan.blocks() - 1}) {
    for (const unsigned t : {0u, 77u, 255u}) {
      threadIdx.x = t;
      Iterator it(s, plan, static_cast<unsigned>(block));
      int64_t index = it.chunk / plan.pieces * plan.chunk_length + it.row;
      if (kMapping == Mapping::ChannelsLast && it.remaining > 0) {
        const int64_t end = index + (it.remaining - 1) * plan.stride;
        if (it.at_the_end(plan).offset != end * s.C + it.channel) {
          return fail(s, bytes, "a wrong end in a huge tensor");
        }
      }
      for (int step = 0; step < 100 && it.remaining > 0; ++step) {
        const __int128 row = Iterator::kAlong ? index * kWidth / s.S : index;
        __int128 right = row * s.C + it.channel;
        if (Iterator::kAlong) right = right * s.S + index * kWidth % s.S;
        if (Iterator::kGrouped) {
          const int64_t column = it.chunk % plan.pieces * plan.columns + it.column;
          right = (row * s.C + it.tile * plan.group) * s.S + column * kWidth;
          if (it.offset / s.S % s.C != it.channel) return fail(s, bytes, "a wrong channel");
        }
        if (it.offset != right) return fail(s, bytes, "a wrong offset in a huge tensor");
        it.advance(plan);
        index += plan.stride;
      }
    }
  }
}

template <int kWidth, Mapping kMapping>
void check_mapping(const Shape& s, int bytes, const TilePlan& plan, bool whole) {
  whole ? visit_whole<kWidth, kMapping>(s, bytes, plan)
        : visit_some<kWidth, kMapping>(s, bytes, plan);
}

template <int kWidth>
void check_width(const Shape& s, int bytes, const TilePlan& plan, bool whole) {
  switch (plan.mapping) {
    case Mapping::ChannelsFirst:
      return check_mapping<kWidth, Mapping::ChannelsFirst>(s, bytes, plan, whole);
    case Mapping::ChannelsLast:
      return check_mapping<kWidth, Mapping::ChannelsLast>(s, bytes, plan, whole);
    default:
      return check_mapping<kWidth, Mapping::ChannelGroups>(s, bytes, plan, whole);
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
                    const ResidentPlan& plan, bool aligned, bool whole) {
  if (plan.path == Path::TwoPass) {
    if (plan.reason[0] == '\0') fail(s, bytes, "no reason for two passes");
    return;
  }
  const TilePlan& tile_plan = plan.tile_plan;
  const int64_t team = tile_plan.chunks;
  check_limits(s, bytes, aligned, tile_plan);
  if (plan.shared_bytes > device.shared_per_block)
    fail(s, bytes, "more shared memory than there is");
  const SharedLayout shared = shared_layout(tile_plan.mapping, channels_per_tile(tile_plan));
  const bool grouped = tile_plan.mapping == Mapping::ChannelGroups;
  const int64_t vectors =
      int64_t{tensors} * plan.vectors * (grouped ? tile_plan.rows * tile_plan.columns : kThreads);
  if (shared.team % 16 != 0 || shared.table % 16 != 0 || shared.vectors % 16 != 0 ||
      shared.team < reduce_shared_bytes(tile_plan) ||
      shared.table < shared.team + 2 * channels_per_tile(tile_plan) * 16 ||
      plan.shared_bytes < shared.vectors + vectors * tile_plan.width * bytes) {
    fail(s, bytes, "shared memory that overlaps");
  }
  if (!tile_plan.sweeps && int64_t{plan.vectors} * tile_plan.rows < tile_plan.chunk_length)
    fail(s, bytes, "too few vectors");
  if (tile_plan.sweeps != (s.layout == Layout::ChannelsLast)) fail(s, bytes, "sweeps");
  const int64_t held =
      ByLimits{device, tensors}(tile_plan, plan.path, static_cast<int>(team), plan.shared_bytes);
  if (plan.teams < 1 || plan.teams > tile_plan.tiles) fail(s, bytes, "a number of teams");
  switch (plan.path) {
    case Path::Block:
      if (team != 1 || held < 1) fail(s, bytes, "not one block");
      break;
    case Path::Cluster:
      if (team < 2 || team > device.max_cluster || held < 1) {
        fail(s, bytes, "a cluster that there is not");
      }
      break;
    default:
      // All blocks at once, or a barrier of a team waits for ever.
      if (!device.cooperative || plan.blocks() > held) {
        fail(s, bytes, "a grid that is not resident");
      }
  }
  switch (tile_plan.width) {
    case 1:
      return check_width<1>(s, bytes, tile_plan, whole);
    case 4:
      return check_width<4>(s, bytes, tile_plan, whole);
    default:
      return check_width<8>(s, bytes, tile_plan, whole);
  }
}

int check_residency(const Shape& s, int bytes, bool aligned, int tensors, const DeviceLimits& d) {
  const Wanted each[] = {{},
                         {false, Path::TwoPass},
                         {false, Path::Block},
                         {false, Path::Cluster},
                         {false, Path::Grid}};
  for (const Wanted& wanted : each) {
    const ResidentPlan plan =
        plan_resident(s, bytes, aligned, tensors, d, ByLimits{d, tensors}, wanted);
    const bool as_wanted = wanted.any || plan.path == wanted.path || plan.tile_plan.chunks == 1 ||
                           plan.path == Path::TwoPass;
    if (!as_wanted) fail(s, bytes, "another path than was asked for");
    if (wanted.any) ++paths[static_cast<int>(plan.path)];
    check_resident(s, bytes, tensors, d, plan, aligned, wanted.any && s.numel() <= 40000);
  }
  // A device that holds nothing of what it is asked to hold.
  const ResidentPlan none = plan_resident(
      s, bytes, aligned, tensors, d, [](const TilePlan&, Path, int, int) { return int64_t{0}; });
  if (none.path != Path::TwoPass) fail(s, bytes, "resident where nothing is");
  return 5;
}

int check_residency(const Shape& s) {
  int plans = 0;
  for (const int bytes : {2, 4}) {
    for (const int tensors : {1, 2}) {
      for (const Generation& g : kGenerations) {
        plans += check_residency(s, bytes, true, tensors, g.limits);
      }
      plans += check_residency(s, bytes, false, tensors, kGenerations[3].limits);
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
        const TilePlan plan = plan_two_pass(s, bytes, aligned, device);
        check_limits(s, bytes, aligned, plan);
        check_exchange(s, bytes, plan);
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
      // As large as layers of nets are, and larger; rows of odd lengths besides.
      plans +=
          check_residency({1 + below(256), 16 * (1 + below(128)), 16 * (1 + below(3136)), layout});
      plans += check_residency({1 + below(256), 8 * (1 + below(256)), 1 + below(5000), layout});
    }
    const int64_t huge = int64_t{1} << 31;
    for (const Shape& s : {Shape{1, 1, huge + 24, layout}, Shape{huge / 64 + 1, 128, 49, layout},
                           Shape{70000, 64, 3136, layout}, Shape{huge, 2, 1, layout},
                           Shape{2, 1 << 20, 1056, layout}, Shape{1, 3, huge * 4, layout},
                           Shape{3, 16, kMostGroupedPositions - 1, layout},
                           Shape{3, 16, kMostGroupedPositions + 1, layout}}) {
      plans += check(s) + check_residency(s);
    }
  }
  for (const int count : paths) {
    if (count < 100) fail({}, 0, "a path that is hardly ever taken");
  }
  std::printf("%d plans\n", plans);
  return failures == 0 ? 0 : 1;
}
