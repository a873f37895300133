#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace emulator {
namespace detail {
namespace {

std::uint64_t find(const Known& known, std::uint64_t key) {
  const auto at = std::lower_bound(known.begin(), known.end(), key,
                                   [](const Epoch& e, std::uint64_t k) { return e.key < k; });
  return at != known.end() && at->key == key ? at->clock : 0;
}

std::uint64_t lane_clock(const Thread& thread, int lane) {
  const std::uint64_t full = thread.warp->full[lane];
  return thread.extra == nullptr ? full : std::max(thread.extra->lanes[lane], full);
}

}  // namespace

bool covers(const Known& known, const Epoch& epoch) {
  return find(known, key_of_block(block_of(epoch.key))) >= epoch.clock ||
         find(known, epoch.key) >= epoch.clock;
}

KnownPtr join(const KnownPtr& a, const KnownPtr& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  Known merged;
  merged.reserve(a->size() + b->size());
  bool same_as_a = true;
  bool same_as_b = true;
  auto i = a->begin();
  auto j = b->begin();
  while (i != a->end() || j != b->end()) {
    if (j == b->end() || (i != a->end() && i->key < j->key)) {
      merged.push_back(*i++);
      same_as_b = false;
    } else if (i == a->end() || j->key < i->key) {
      merged.push_back(*j++);
      same_as_a = false;
    } else {
      if (i->clock < j->clock) same_as_a = false;
      if (j->clock < i->clock) same_as_b = false;
      merged.push_back({i->key, std::max(i->clock, j->clock)});
      ++i;
      ++j;
    }
  }
  if (same_as_a) return a;
  if (same_as_b) return b;
  return std::make_shared<const Known>(std::move(merged));
}

bool happened_before(const Epoch& epoch, const Thread& thread) {
  if (epoch.key == thread.key) return true;
  if (block_of(epoch.key) == thread.block->number) {
    if (epoch.clock < thread.block->phase << 32) return true;
    const int other = thread_of(epoch.key);
    if (other / 32 == thread.index / 32 && epoch.clock <= lane_clock(thread, other % 32)) {
      return true;
    }
  }
  return thread.known != nullptr && covers(*thread.known, epoch);
}

void take_snapshot(Snapshot& snapshot, const Thread& thread) {
  snapshot.phase = thread.block->phase;
  snapshot.clock = thread.clock;
  for (int lane = 0; lane < 32; ++lane) snapshot.lanes[lane] = lane_clock(thread, lane);
  snapshot.known = thread.known;
  snapshot.all = nullptr;
}

const KnownPtr& as_known(Snapshot& snapshot, const Thread& thread) {
  if (snapshot.all == nullptr) {
    Known own;
    const std::uint64_t past = snapshot.phase << 32;
    own.push_back({key_of_block(thread.block->number), past});
    const int first = thread.index / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) {
      const bool self = first + lane == thread.index;
      const std::uint64_t clock = self ? snapshot.clock : snapshot.lanes[lane];
      if (clock > past) own.push_back({key_of(thread.block->number, first + lane), clock});
    }
    snapshot.all = join(std::make_shared<const Known>(std::move(own)), snapshot.known);
  }
  return snapshot.all;
}

}  // namespace detail
}  // namespace emulator
