// Shuffles, votes and __syncwarp: collectives of the lanes that a mask names.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "settings.h"

namespace emulator {
namespace detail {
namespace {

Thread& lane_of(const Thread& thread, int lane) {
  return thread.block->threads[thread.index / 32 * 32 + lane];
}

std::string lanes_text(std::uint32_t mask) {
  std::string text = mask != 0 && (mask & (mask - 1)) == 0 ? "lane " : "lanes ";
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    int end = lane;
    while (end + 1 < 32 && (mask >> (end + 1) & 1) != 0) ++end;
    text += (first ? "" : ", ") + std::to_string(lane);
    if (end > lane) text += "-" + std::to_string(end);
    first = false;
    lane = end;
  }
  return text;
}

std::string call_text(Where where, unsigned mask) {
  return std::string(name_of(where)) + " with mask " + hex(mask);
}

// The lane that a shuffle reads, according to the PTX specification.
int source_lane(const Thread& t, int lane) {
  const int first = lane & ~(t.width - 1);
  const int last = first + t.width - 1;
  int source = lane;
  switch (t.waits) {
    case Where::kShfl:
      return first + (t.argument & (t.width - 1));
    case Where::kShflXor:
      source = lane ^ t.argument;
      return source >= 0 && source <= last ? source : lane;
    case Where::kShflDown:
      return t.argument >= 0 && t.argument <= last - lane ? lane + t.argument : lane;
    default:
      return t.argument >= 0 && t.argument <= lane - first ? lane - t.argument : lane;
  }
}

bool is_vote(Where where) {
  return where == Where::kBallot || where == Where::kAny || where == Where::kAll;
}

unsigned vote_result(const Thread& any, unsigned mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && lane_of(any, lane).value[0] != 0) ballot |= 1u << lane;
  }
  if (any.waits == Where::kBallot) return ballot;
  return any.waits == Where::kAny ? ballot != 0 : ballot == mask;
}

// Gives each of the lanes what any of them knew.
void exchange_knowledge(Thread& any, unsigned mask) {
  KnownPtr known = any.known;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Thread& t = lane_of(any, lane);
    if (t.known != known) known = join(known, t.known);
  }
  if (mask == ~0u) {
    for (int lane = 0; lane < 32; ++lane) any.warp->full[lane] = lane_of(any, lane).clock;
  } else {
    std::uint64_t lanes[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      Thread& t = lane_of(any, lane);
      for (int i = 0; i < 32; ++i) lanes[i] = std::max(lanes[i], t.more().lanes[i]);
      lanes[lane] = std::max(lanes[lane], t.clock);
    }
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      std::copy(lanes, lanes + 32, lane_of(any, lane).extra->lanes);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& t = lane_of(any, lane);
    if (t.known != known) t.known = known;
    ++t.clock;
  }
}

__attribute__((noinline)) void check_call(const Thread& self, Where where, unsigned mask, int width,
                                          int lane) {
  const Warp& warp = *self.warp;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    report_fatal("warp", std::string("calls ") + name_of(where) + " with width " +
                             std::to_string(width) + ", which is not a power of two up to 32");
  }
  if ((mask >> lane & 1) == 0) {
    report_fatal("warp", "calls " + call_text(where, mask) + ", which does not name its own lane " +
                             std::to_string(lane));
  }
  if ((mask & ~warp.present) != 0) {
    report_fatal("warp", "calls " + call_text(where, mask) + ", which names " +
                             lanes_text(mask & ~warp.present) + ": the block has no such threads");
  }
  if ((mask & warp.exited) != 0) {
    report_fatal("warp", "calls " + call_text(where, mask) + ", which names " +
                             lanes_text(mask & warp.exited) + ": exited");
  }
}

// Checks a lane's call against the lanes of its warp that wait already.
void check_meeting(const Thread& self) {
  Warp& warp = *self.warp;
  if (warp.waiting == 0) {
    warp.mask = self.mask;
    warp.where = self.waits;
    warp.bytes = self.bytes;
    warp.alike = true;
  }
  const bool as_first =
      warp.mask == self.mask && warp.where == self.waits && warp.bytes == self.bytes;
  if (warp.alike && as_first) return;
  warp.alike = false;
  for (int lane = 0; lane < 32; ++lane) {
    if ((self.warp->waiting >> lane & 1) == 0) continue;
    const Thread& other = lane_of(self, lane);
    const int own = self.index % 32;
    const bool meet = (self.mask >> lane & 1) != 0 || (other.mask >> own & 1) != 0;
    if (!meet) continue;
    if (other.mask != self.mask) {
      report_fatal("warp", "calls " + call_text(self.waits, self.mask) + " while " +
                               describe(other) + " waits at " + call_text(other.waits, other.mask));
    }
    if (other.waits != self.waits || other.bytes != self.bytes) {
      report_fatal("warp", "calls " + call_text(self.waits, self.mask) + " while " +
                               describe(other) + ", which the mask names, waits at " +
                               name_of(other.waits) +
                               (other.waits == self.waits ? " of another type" : ""));
    }
  }
}

// All lanes of the mask have arrived. In a function of its own, because its variables would
// otherwise be on the stack of every waiting thread.
__attribute__((noinline)) void complete(Thread& self) {
  const Where where = self.waits;
  const unsigned mask = self.mask;
  unsigned char results[32][8];
  const unsigned vote = is_vote(where) ? vote_result(self, mask) : 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0 || self.bytes == 0) continue;
    const Thread& t = lane_of(self, i);
    if (is_vote(where)) {
      std::memcpy(results[i], &vote, sizeof(vote));
      continue;
    }
    const int source = source_lane(t, i);
    if ((mask >> source & 1) == 0) {
      report_fatal(t, "warp",
                   "calls " + call_text(where, mask) + " and reads lane " + std::to_string(source) +
                       ", which the mask does not name");
    }
    std::memcpy(results[i], lane_of(self, source).value, 8);
  }
  if (where == Where::kSyncwarp || settings().shuffles_order_memory) {
    exchange_knowledge(self, mask);
  }
  if (mask == ~0u) ++self.warp->meetings;
  self.warp->waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& t = lane_of(self, i);
    if (self.bytes > 0) std::memcpy(t.value, results[i], 8);
    make_ready(t);
  }
  moved_on();
}

}  // namespace

void warp_collective(Where where, unsigned mask, int argument, int width, int bytes,
                     const void* value, void* result) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  const int lane = self.index % 32;
  const bool plain = mask == ~0u && warp.present == ~0u && warp.exited == 0 && width == 32;
  if (!plain) check_call(self, where, mask, width, lane);
  self.waits = where;
  self.mask = mask;
  self.argument = argument;
  self.width = width;
  self.bytes = bytes;
  if (bytes > 0) std::memcpy(self.value, value, static_cast<std::size_t>(bytes));
  check_meeting(self);
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) == mask) complete(self);
  leave();
  if (bytes > 0) std::memcpy(result, self.value, static_cast<std::size_t>(bytes));
}

unsigned active_mask() {
  // Which other lanes are active is up to the hardware; correct code works with any answer.
  return 1u << current->index % 32;
}

void exit_warp(Thread& thread) {
  const int own = thread.index % 32;
  for (int lane = 0; lane < 32; ++lane) {
    if ((thread.warp->waiting >> lane & 1) == 0) continue;
    const Thread& other = lane_of(thread, lane);
    if ((other.mask >> own & 1) == 0) continue;
    report_fatal("warp", "has exited, while " + describe(other) + " waits for it at " +
                             call_text(other.waits, other.mask) + ", which names its lane " +
                             std::to_string(own));
  }
}

}  // namespace detail
}  // namespace emulator
