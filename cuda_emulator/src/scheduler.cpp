// Which thread runs next: drawn from a seed.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "settings.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace detail {

Thread* current = nullptr;
Launch* running = nullptr;

namespace {

// Unwinds the thread that aborts its launch, because its calls hold memory. The other threads are
// dropped: where they wait, there is nothing to free.
struct Aborted {};

// The context that called the launch.
Fiber* caller = nullptr;
// Unused stacks. A fibre that is about to switch away for the last time puts itself here.
std::vector<std::unique_ptr<Fiber>> idle;
std::uint64_t random_state = 1;
Block* last_block = nullptr;  // that ran; null where it is gone

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Probabilities are multiples of 1 / kOne.
constexpr unsigned kOne = 65536;
bool chance(unsigned probability) {
  return draw() % kOne < probability;
}

void set_builtins(const Thread& thread) {
  threadIdx = thread.at;
  blockIdx = thread.block->at;
  last_block = thread.block;
}

// Takes one of the ready threads; null if there is none.
Thread* pick() {
  Launch& launch = *running;
  if (launch.ready.empty()) return nullptr;
  Block* block = last_block;
  if (block == nullptr || block->ready_slot < 0 || !chance(launch.stay)) {
    block = launch.ready[draw(launch.ready.size())];
  }
  auto& ready = block->ready;
  if (!chance(launch.last)) std::swap(ready.back(), ready[draw(ready.size())]);
  Thread* thread = ready.back();
  ready.pop_back();
  if (ready.empty()) {
    launch.ready.back()->ready_slot = block->ready_slot;
    launch.ready[block->ready_slot] = launch.ready.back();
    launch.ready.pop_back();
    block->ready_slot = -1;
  }
  return thread;
}

void run_threads();

std::unique_ptr<Fiber> idle_fiber() {
  if (idle.empty()) return std::make_unique<Fiber>(&run_threads);
  auto fiber = std::move(idle.back());
  idle.pop_back();
  return fiber;
}

// Switches from `from` to `next`, or to the caller if there is none.
void run(Fiber& from, Thread* next) {
  current = next;
  if (next == nullptr) {
    Fiber::switch_to(from, *caller);
    return;
  }
  if (next->fiber == nullptr) next->fiber = idle_fiber();
  set_builtins(*next);
  Fiber::switch_to(from, *next->fiber);
}

void end_thread(Thread& thread) {
  moved_on();
  thread.exited = true;
  ++running->exited_threads;
  --running->live_threads;
  thread.warp->exited |= 1u << thread.index % 32;
  Block* block = thread.block;
  if (--block->live == 0 && --block->cluster->live == 0) {
    last_block = nullptr;
    end_cluster(block->cluster);
  }
}

// The main function of each stack: runs one thread after the other.
void run_threads() {
  for (;;) {
    Thread* thread = current;
    try {
      running->body(running->context);
      exit_shared(*thread);
      exit_barriers(*thread);
      exit_warp(*thread);
    } catch (const Aborted&) {
    }
    // Not within the handler, because the exception being handled belongs to the operating system's
    // thread.
    if (running->aborted) Fiber::switch_to(*thread->fiber, *caller);
    std::unique_ptr<Fiber> self = std::move(thread->fiber);
    end_thread(*thread);
    Thread* next = pick();
    if (next != nullptr && next->fiber == nullptr) {
      current = next;
      set_builtins(*next);
      next->fiber = std::move(self);
      continue;
    }
    Fiber& fiber = *self;
    idle.push_back(std::move(self));
    run(fiber, next);
  }
}

}  // namespace

std::uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1du >> 24;
}

void seed_draws(std::uint64_t seed) {
  random_state = mix(seed) | 1;
}

void make_ready(Thread& thread) {
  Block& block = *thread.block;
  thread.waits = Where::kNowhere;
  block.ready.push_back(&thread);
  if (block.ready_slot < 0) {
    block.ready_slot = static_cast<int>(running->ready.size());
    running->ready.push_back(&block);
  }
}

void leave() {
  Thread* self = current;
  Thread* next = pick();
  if (next == self) {
    set_builtins(*self);
    return;
  }
  run(*self->fiber, next);
}

void yield() {
  if (++running->steps > settings().patience + 1000 * running->live_threads) {
    report_everyone("livelock", "threads run, but none of them gets anywhere");
    abort_launch();
  }
  make_ready(*current);
  leave();
}

void maybe_yield() {
  Launch& launch = *running;
  if (launch.countdown-- > 0) return;
  launch.countdown = draw(2 * launch.stride);
  yield();
}

void moved_on() {
  running->steps = 0;
}

void abort_launch() {
  running->aborted = true;
  throw Aborted{};
}

void run_launch(Launch& launch, std::uint64_t seed, int resident_clusters) {
  static std::uint32_t generations = 0;
  seed_draws(seed);
  running = &launch;
  launch.generation = ++generations;
  const unsigned leaves[] = {kOne, kOne / 2, kOne / 8, kOne / 128};
  const unsigned rare[] = {kOne / 512, kOne / 1024, kOne / 4096, kOne / 16384};
  const unsigned lasts[] = {0, kOne / 4, kOne / 4 * 3, kOne - kOne / 64};
  const unsigned strides[] = {2, 8, 64, 4096};
  // With more threads than the caches hold, a block runs for a long time before the next one.
  const std::uint64_t blocks = volume(launch.grid);
  const std::uint64_t resident =
      std::min(blocks, static_cast<std::uint64_t>(resident_clusters) * volume(launch.cluster)) *
      volume(launch.block);
  launch.stay = kOne - (resident > 4096 ? rare : leaves)[draw(4)];
  launch.last = lasts[draw(4)];
  launch.stride = strides[draw(4)];
  launch.countdown = draw(2 * launch.stride);
  start_memory();
  start_atomics();

  gridDim = launch.grid;
  blockDim = launch.block;
  start_clusters(resident_clusters);

  Fiber here;
  caller = &here;
  run(here, pick());

  if (!launch.aborted && launch.live_threads > 0) {
    launch.aborted = true;
    report_everyone("deadlock", "no thread can go on");
  }
  current = nullptr;
  for (auto& cluster : launch.clusters) {
    for (auto& block : cluster->blocks) {
      for (Thread& thread : block->threads) {
        if (thread.fiber == nullptr) continue;
        thread.fiber->restart();
        idle.push_back(std::move(thread.fiber));
      }
    }
  }
  drop_clusters();
  running = nullptr;
  caller = nullptr;
  last_block = nullptr;
}

}  // namespace detail
}  // namespace emulator
