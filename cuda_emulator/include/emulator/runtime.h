// The functions of the runtime that the templates of the other headers call. Not for kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace emulator {
namespace detail {

struct Block;

// Where a thread can wait.
enum class Where : unsigned char {
  kNowhere,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
  kClusterSync,
  kGridSync,
  kSyncwarp,
  kShfl,
  kShflXor,
  kShflDown,
  kShflUp,
  kBallot,
  kAny,
  kAll,
};

// ---- Barriers, votes, shuffles; the return value is that of CUDA's function ----
int block_barrier(Where where, int predicate);
void cluster_barrier();
void grid_barrier();
void warp_collective(Where where, unsigned mask, int argument, int width, int bytes,
                     const void* value, void* result);
unsigned active_mask();
void fence(bool whole_device);
unsigned load_acquire(const unsigned* p);
void sleep();

// ---- Memory ----
Block* current_block();
Block* block_in_cluster(unsigned rank);
unsigned cluster_rank();
unsigned cluster_size();
// Reports a bad offset into the running block's shared memory.
void check_shared_offset(std::ptrdiff_t offset, std::size_t alignment);
void shared_read(Block* owner, std::ptrdiff_t offset, void* to, std::size_t bytes);
void shared_write(Block* owner, std::ptrdiff_t offset, const void* from, std::size_t bytes);
void workspace_read(const void* from, void* to, std::size_t bytes, std::size_t alignment);
void workspace_write(void* to, const void* from, std::size_t bytes, std::size_t alignment);
void tensor_read(const void* from, void* to, std::size_t bytes);
void prefetch(const void* p);
void tensor_write(void* to, const void* from, std::size_t bytes);
void tensor_write_evict_first(void* to, const void* from, std::size_t bytes);
void async_copy(Block* owner, std::ptrdiff_t offset, const void* from);
void async_commit();
void async_wait(int pending_groups);

// An address: in the shared memory of `owner`, or in global memory if `owner` is null.
struct Place {
  Block* owner;
  std::uintptr_t at;
};
// Between the two calls no other thread runs. Null means that the access was reported and must not
// be made.
void* atomic_begin(Place place, std::size_t bytes);
void atomic_end(Place place, std::size_t bytes, bool wrote);

}  // namespace detail
}  // namespace emulator
