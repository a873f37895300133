// Blocks of the running launch: which ones start next, and their memory.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace detail {
namespace {

// Kept from launch to launch to reuse their memory.
std::vector<std::unique_ptr<Block>> unused_blocks;
// Numbers of the clusters that have not started; the last one starts next.
std::vector<std::uint64_t> waiting_clusters;

std::unique_ptr<Block> new_block(const Launch& launch, std::uint64_t number) {
  static std::uint32_t generations = 0;
  std::unique_ptr<Block> block;
  if (unused_blocks.empty()) {
    block = std::make_unique<Block>();
  } else {
    block = std::move(unused_blocks.back());
    unused_blocks.pop_back();
  }
  block->number = number;
  const std::uint64_t row = number / launch.grid.x;
  block->at = {static_cast<unsigned>(number % launch.grid.x),
               static_cast<unsigned>(row % launch.grid.y),
               static_cast<unsigned>(row / launch.grid.y)};
  const int threads = static_cast<int>(volume(launch.block));
  block->live = threads;
  block->generation = ++generations;
  block->phase = 1;
  block->barrier = Where::kNowhere;
  block->arrived = 0;
  block->predicates = 0;
  block->gathered = nullptr;
  block->remote.clear();
  block->memory.resize(launch.shared_bytes + 128);
  const auto address = reinterpret_cast<std::uintptr_t>(block->memory.data());
  block->shared = block->memory.data() + (128 - address % 128) % 128;
  block->shadow.resize(launch.shared_bytes + 4);
  block->shadow.forget();
  poison(block->shared, launch.shared_bytes);
  block->warps.assign((threads + 31) / 32, Warp{});
  block->threads = std::vector<Thread>(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& t = block->threads[i];
    const unsigned u = static_cast<unsigned>(i);
    t.block = block.get();
    t.warp = &block->warps[i / 32];
    t.warp->present |= 1u << i % 32;
    t.index = i;
    t.at = {u % launch.block.x, u / launch.block.x % launch.block.y,
            u / launch.block.x / launch.block.y};
    t.key = key_of(number, i);
    t.clock = block->phase << 32 | 1;
    make_ready(t);
  }
  return block;
}

void start_cluster() {
  Launch& launch = *running;
  const std::uint64_t number = waiting_clusters.back();
  waiting_clusters.pop_back();
  auto cluster = std::make_unique<Cluster>();
  const dim3 size = launch.cluster;
  const std::uint64_t per_row = launch.grid.x / size.x;
  const std::uint64_t per_slice = launch.grid.y / size.y;
  const std::uint64_t x = number % per_row * size.x;
  const std::uint64_t y = number / per_row % per_slice * size.y;
  const std::uint64_t z = number / per_row / per_slice * size.z;
  for (unsigned k = 0; k < size.z; ++k) {
    for (unsigned j = 0; j < size.y; ++j) {
      for (unsigned i = 0; i < size.x; ++i) {
        auto block = new_block(launch, ((z + k) * launch.grid.y + y + j) * launch.grid.x + x + i);
        block->cluster = cluster.get();
        block->rank = static_cast<unsigned>(cluster->blocks.size());
        launch.live_threads += block->threads.size();
        cluster->blocks.push_back(std::move(block));
      }
    }
  }
  cluster->live = static_cast<int>(cluster->blocks.size());
  launch.clusters.push_back(std::move(cluster));
}

}  // namespace

void start_clusters(int resident) {
  const Launch& launch = *running;
  const std::uint64_t clusters = volume(launch.grid) / volume(launch.cluster);
  waiting_clusters.resize(clusters);
  for (std::uint64_t i = 0; i < clusters; ++i) {
    waiting_clusters[i] = i;
    std::swap(waiting_clusters[i], waiting_clusters[draw(i + 1)]);
  }
  for (int i = 0; i < resident && !waiting_clusters.empty(); ++i) start_cluster();
}

void end_cluster(Cluster* cluster) {
  Launch& launch = *running;
  for (auto& block : cluster->blocks) unused_blocks.push_back(std::move(block));
  const auto at = std::find_if(launch.clusters.begin(), launch.clusters.end(),
                               [&](const auto& c) { return c.get() == cluster; });
  std::swap(*at, launch.clusters.back());
  launch.clusters.pop_back();
  if (!waiting_clusters.empty()) start_cluster();
}

void drop_clusters() {
  for (auto& cluster : running->clusters) {
    for (auto& block : cluster->blocks) {
      block->ready.clear();
      block->ready_slot = -1;
      unused_blocks.push_back(std::move(block));
    }
  }
  running->clusters.clear();
}

}  // namespace detail
}  // namespace emulator
