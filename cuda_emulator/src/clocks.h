// The happens-before relation, by compressed vector clocks.
//
// The clock of a thread is (phase of its block) << 32 | (its own events in this phase). A barrier
// of the block ends a phase: everything with a clock of an earlier phase of the same block happened
// before. Within a phase a thread also knows
//   - its warp: one clock per lane (Thread::lanes, and Warp::full for barriers of all lanes);
//   - other warps and blocks: a sorted list of clocks of single threads and of whole blocks, shared
//     between threads that know the same.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {
namespace detail {

struct Thread;

// Bits of a key that hold the number of the thread in its block, from 1; 0 is the whole block.
constexpr int kThreadBits = 11;
inline std::uint64_t key_of(std::uint64_t block, int thread) {
  return block << kThreadBits | static_cast<std::uint64_t>(thread + 1);
}
inline std::uint64_t key_of_block(std::uint64_t block) {
  return block << kThreadBits;
}
inline std::uint64_t block_of(std::uint64_t key) {
  return key >> kThreadBits;
}
inline int thread_of(std::uint64_t key) {
  return static_cast<int>(key & ((1u << kThreadBits) - 1)) - 1;
}

// A moment: everything that the thread or block of `key` did with a clock of at most `clock`.
struct Epoch {
  std::uint64_t key = 0;
  std::uint64_t clock = 0;  // 0: never
};

// Moments of other threads and blocks, one per key, sorted by it.
using Known = std::vector<Epoch>;
using KnownPtr = std::shared_ptr<const Known>;

// The union. Returns one of the two if it contains the other.
KnownPtr join(const KnownPtr& a, const KnownPtr& b);
bool covers(const Known& known, const Epoch& epoch);

// Everything that a thread knew at a fence, including its own past.
struct Snapshot {
  std::uint64_t phase = 0;
  std::uint64_t clock = 0;
  std::uint64_t lanes[32] = {};
  KnownPtr known;
  KnownPtr all;  // the same as a list, made on demand
};

bool happened_before(const Epoch& epoch, const Thread& thread);
void take_snapshot(Snapshot& snapshot, const Thread& thread);
const KnownPtr& as_known(Snapshot& snapshot, const Thread& thread);

}  // namespace detail
}  // namespace emulator
