// Barriers of blocks, clusters and grids.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace detail {
namespace {

// A thread of the block that has exited, or that waits at `where`; null if there is none.
const Thread* find_exited(const Block& block) {
  for (const Thread& t : block.threads) {
    if (t.exited) return &t;
  }
  return nullptr;
}
const Thread* find_waiting(const Block& block, Where where) {
  for (const Thread& t : block.threads) {
    if (t.waits == where) return &t;
  }
  return nullptr;
}

const Thread* find_exited(const Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
    if (const Thread* t = find_exited(*block)) return t;
  }
  return nullptr;
}

void refuse_exited(Where where, const Thread* exited) {
  if (exited == nullptr) return;
  report_fatal("barrier", std::string("is at ") + name_of(where) + ", which " + describe(*exited) +
                              " never reaches: it has exited");
}

// All threads of the block have arrived: they continue in a new phase, each knowing what any of
// them knew.
void release(Block& block, const KnownPtr& known) {
  ++block.phase;
  block.arrived = 0;
  block.barrier = Where::kNowhere;
  block.gathered = nullptr;
  for (Thread& t : block.threads) {
    t.clock = block.phase << 32 | 1;
    if (t.known != known) t.known = known;
    make_ready(t);
  }
  moved_on();
}

// What a barrier of several blocks adds: each block knows all that the others did before it.
KnownPtr past_of(const std::vector<Block*>& blocks) {
  Known past;
  for (const Block* block : blocks) {
    past.push_back({key_of_block(block->number), (block->phase + 1) << 32});
  }
  std::sort(past.begin(), past.end(), [](const Epoch& a, const Epoch& b) { return a.key < b.key; });
  return std::make_shared<const Known>(std::move(past));
}

void release(const std::vector<Block*>& blocks, const KnownPtr& gathered) {
  const KnownPtr known = join(past_of(blocks), gathered);
  for (Block* block : blocks) release(*block, known);
}

}  // namespace

int block_barrier(Where where, int predicate) {
  Thread& self = *current;
  Block& block = *self.block;
  if (block.live < static_cast<int>(block.threads.size())) {
    refuse_exited(where, find_exited(block));
  }
  if (block.arrived > 0 && block.barrier != where) {
    report_fatal("barrier", std::string("is at ") + name_of(where) + " while " +
                                describe(*find_waiting(block, block.barrier)) + " waits at " +
                                name_of(block.barrier));
  }
  if (block.arrived == 0) block.predicates = 0;
  block.barrier = where;
  ++block.arrived;
  block.predicates += predicate != 0;
  block.gathered = block.arrived == 1 ? self.known : join(block.gathered, self.known);
  self.waits = where;
  if (block.arrived == static_cast<int>(block.threads.size())) {
    const int threads = block.arrived;
    block.result = where == Where::kSyncthreadsOr    ? block.predicates > 0
                   : where == Where::kSyncthreadsAnd ? block.predicates == threads
                                                     : block.predicates;
    release(block, KnownPtr(block.gathered));
  }
  leave();
  // The next barrier of the block cannot complete before this thread arrives at it.
  return block.result;
}

void cluster_barrier() {
  Thread& self = *current;
  if (!running->clustered) {
    report_fatal("cluster", "calls cluster_sync in a launch without clusters");
  }
  Cluster& cluster = *self.block->cluster;
  refuse_exited(Where::kClusterSync, find_exited(cluster));
  cluster.gathered = cluster.arrived == 0 ? self.known : join(cluster.gathered, self.known);
  self.waits = Where::kClusterSync;
  const std::size_t threads = cluster.blocks.size() * self.block->threads.size();
  if (static_cast<std::size_t>(++cluster.arrived) == threads) {
    cluster.arrived = 0;
    std::vector<Block*> blocks;
    for (const auto& block : cluster.blocks) blocks.push_back(block.get());
    release(blocks, KnownPtr(cluster.gathered));
  }
  leave();
}

void grid_barrier() {
  Thread& self = *current;
  Launch& launch = *running;
  if (!launch.cooperative) {
    report_fatal("grid", "calls grid_sync in a launch that is not cooperative");
  }
  if (launch.exited_threads > 0) {
    const Thread* exited = nullptr;
    for (const auto& cluster : launch.clusters) {
      if (exited == nullptr) exited = find_exited(*cluster);
    }
    if (exited == nullptr) {
      report_fatal("barrier", "is at grid_sync, which a block that has exited never reaches");
    }
    refuse_exited(Where::kGridSync, exited);
  }
  launch.grid_gathered =
      launch.grid_arrived == 0 ? self.known : join(launch.grid_gathered, self.known);
  self.waits = Where::kGridSync;
  if (++launch.grid_arrived == launch.live_threads) {
    launch.grid_arrived = 0;
    std::vector<Block*> blocks;
    for (const auto& cluster : launch.clusters) {
      for (const auto& block : cluster->blocks) blocks.push_back(block.get());
    }
    release(blocks, KnownPtr(launch.grid_gathered));
  }
  leave();
}

void exit_barriers(Thread& thread) {
  const Block& block = *thread.block;
  const Thread* waiting = nullptr;
  if (block.arrived > 0) waiting = find_waiting(block, block.barrier);
  if (block.cluster->arrived > 0) {
    for (const auto& peer : block.cluster->blocks) {
      if (waiting == nullptr) waiting = find_waiting(*peer, Where::kClusterSync);
    }
  }
  if (running->grid_arrived > 0) {
    for (const auto& cluster : running->clusters) {
      for (const auto& other : cluster->blocks) {
        if (waiting == nullptr) waiting = find_waiting(*other, Where::kGridSync);
      }
    }
  }
  if (waiting == nullptr) return;
  report_fatal("barrier", std::string("has exited, and never reaches ") + name_of(waiting->waits) +
                              ", where " + describe(*waiting) + " waits");
}

}  // namespace detail
}  // namespace emulator
