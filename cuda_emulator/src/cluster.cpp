// A block's queries about its cluster.
#include "machine.h"

namespace emulator {
namespace detail {

Block* current_block() {
  return current->block;
}

static void require_cluster(const char* call) {
  if (running->clustered) return;
  report_fatal("cluster", std::string("calls ") + call + " in a launch without clusters");
}

Block* block_in_cluster(unsigned rank) {
  require_cluster("in_block");
  const auto& blocks = current->block->cluster->blocks;
  if (rank >= blocks.size()) {
    report_fatal("cluster", "asks for block " + std::to_string(rank) + " of a cluster of " +
                                std::to_string(blocks.size()));
  }
  return blocks[rank].get();
}

unsigned cluster_rank() {
  require_cluster("cluster_rank");
  return current->block->rank;
}

unsigned cluster_size() {
  require_cluster("cluster_size");
  return static_cast<unsigned>(current->block->cluster->blocks.size());
}

}  // namespace detail
}  // namespace emulator
