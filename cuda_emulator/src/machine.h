// The running launch: its blocks, warps and threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "emulator/harness.h"
#include "emulator/runtime.h"
#include "fiber.h"
#include "shadow.h"

namespace emulator {
namespace detail {

struct Warp {
  std::uint32_t present = 0;  // lanes that the block has
  std::uint32_t exited = 0;
  std::uint32_t waiting = 0;  // lanes at shuffles, votes, __syncwarp
  // The call at which the first of `waiting` waits, and whether the others wait at the same one.
  std::uint32_t mask = 0;
  Where where = Where::kNowhere;
  int bytes = 0;
  bool alike = true;
  std::uint64_t full[32] = {};  // the lanes' clocks at the last meeting of all 32
  std::uint64_t meetings = 0;   // of all 32, shuffles and votes included
};

struct AsyncCopy {
  Block* block;
  std::ptrdiff_t offset;
  const void* from;
  std::uint64_t group;
};

// State of a thread that few threads, or few of their steps, need.
struct Extra {
  std::uint64_t lanes[32] = {};  // of the own warp, learned from meetings of fewer than all lanes
  KnownPtr pending;              // read by atomics, not yet ordered by a __threadfence
  KnownPtr pending_block;        // the same, by atomics on shared memory of the own block
  std::unique_ptr<Snapshot> fence;        // the last __threadfence
  std::unique_ptr<Snapshot> fence_block;  // the last of either kind
  std::vector<AsyncCopy> copies;
  std::uint64_t groups = 0;  // committed
};

// Kept small, because every switch between threads touches another one.
struct alignas(64) Thread {
  Block* block = nullptr;
  Warp* warp = nullptr;
  std::unique_ptr<Fiber> fiber;  // null: not started, or exited
  int index = 0;                 // in the block
  uint3 at = {0, 0, 0};          // threadIdx
  std::uint64_t key = 0;
  std::uint64_t clock = 0;
  KnownPtr known;
  std::unique_ptr<Extra> extra;

  bool exited = false;
  Where waits = Where::kNowhere;
  unsigned mask = 0;  // of the shuffle or vote that it waits at, with the next four
  int argument = 0;
  int width = 0;
  int bytes = 0;
  unsigned char value[8] = {};

  Extra& more() {
    if (extra == nullptr) extra = std::make_unique<Extra>();
    return *extra;
  }
};

struct Cluster;

struct Block {
  std::uint64_t number = 0;  // in the grid
  uint3 at = {0, 0, 0};      // blockIdx
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live = 0;

  std::vector<unsigned char> memory;  // shared, with room to align it
  unsigned char* shared = nullptr;
  Shadow shadow;
  std::uint32_t generation = 0;
  // Accesses to this memory by threads of other blocks (key: the last clock) of which it is not
  // known that they happened before the end of this block.
  std::unordered_map<std::uint64_t, std::uint64_t> remote;

  std::uint64_t phase = 1;
  Where barrier = Where::kNowhere;  // at which its threads wait
  int arrived = 0;
  int predicates = 0;  // of those that arrived: how many were not zero
  int result = 0;
  KnownPtr gathered;  // what those that arrived know

  std::vector<Thread*> ready;
  int ready_slot = -1;  // in Launch::ready; -1: no thread is ready
};

inline std::uint64_t volume(const dim3& d) {
  return std::uint64_t{d.x} * d.y * d.z;
}

// A single block if the launch has no clusters.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0;  // blocks
  int arrived = 0;
  KnownPtr gathered;
};

struct Launch {
  std::string kernel;
  dim3 grid, block, cluster;
  bool clustered = false;
  bool cooperative = false;
  std::size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;

  std::uint32_t generation = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;  // that run now
  std::vector<Block*> ready;
  std::uint64_t live_threads = 0;  // of blocks that run now
  std::uint64_t exited_threads = 0;
  std::uint64_t grid_arrived = 0;
  KnownPtr grid_gathered;
  bool aborted = false;
  int reports = 0;
  int races = 0, unwritten = 0, in_flight = 0;

  std::uint64_t steps = 0;  // since something moved on
  // Drawn for each launch: the probabilities of staying in a block and of running the thread that
  // became ready last, and the mean number of recorded accesses between two switches.
  unsigned stay = 0, last = 0, stride = 1;
  std::uint64_t countdown = 0;
};

// The running thread and its launch; null between launches.
extern Thread* current;
extern Launch* running;

// ---- scheduler.cpp ----
std::uint64_t draw();  // random bits of this launch
inline std::uint64_t draw(std::uint64_t n) {
  return draw() % n;
}
void seed_draws(std::uint64_t seed);
void make_ready(Thread& thread);
void leave();        // runs others until the current thread, which waits somewhere, is made ready
void yield();        // lets others run
void maybe_yield();  // the same, at recorded accesses
void moved_on();     // records progress, which a loop that only waits does not make
[[noreturn]] void abort_launch();
void run_launch(Launch& launch, std::uint64_t seed, int resident_clusters);

// ---- blocks.cpp, for the scheduler ----
void start_clusters(int resident);   // the first of a launch
void end_cluster(Cluster* cluster);  // and start another
void drop_clusters();                // those that a launch did not end

// ---- barriers.cpp, warp.cpp, memory.cpp, atomics.cpp: for the scheduler ----
// Reports what the end of a thread breaks, while the thread still counts as running.
void exit_barriers(Thread& thread);
void exit_warp(Thread& thread);
void exit_shared(Thread& thread);
void poison(unsigned char* memory, std::size_t bytes);
void start_memory();  // of a launch
void start_atomics();

// ---- reports.cpp ----
// Adds a report about the running kernel and thread, if there are any, with the text `what`.
void report(const char* kind, const std::string& what);
void report_everyone(const char* kind, const std::string& what);  // and where all threads wait
// The same, and aborts the launch.
[[noreturn]] void report_fatal(const char* kind, const std::string& what);
[[noreturn]] void report_fatal(const Thread& of, const char* kind, const std::string& what);
std::string describe(const Thread& thread);
std::string describe(const Epoch& epoch);  // of a thread of this launch
const char* name_of(Where where);
std::string hex(std::uint64_t value);

}  // namespace detail
}  // namespace emulator
