// What a test says to the emulator and asks it. One state for the whole process; `reset` before
// each case.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "host.h"
#include "types.h"

namespace emulator {

// Forgets memory, reports, launches and settings: an sm_80 with 8 multiprocessors, seed 0. Frees
// what `allocate` returned.
void reset();

// ---- The device ----

// One of sm_75, sm_80, sm_86, sm_90, sm_120, with their limits per block and per multiprocessor.
// False: no such name.
bool set_device(const std::string& architecture, int multiprocessors = 8);

// The order in which threads and blocks run follows from this and the number of the launch since.
void set_seed(std::uint64_t seed);

// CUDA promises no order of memory accesses around shuffles and votes, only around __syncwarp.
// True, the default: they order as __syncwarp does. False: as CUDA promises.
void set_shuffles_order_memory(bool order);

// So many scheduling steps, and 1000 for each thread, without a barrier, a store or an end of a
// thread are reported as a livelock. The default is a million. A loop that neither accesses
// recorded memory nor calls anything of CUDA's is never left.
void set_patience(std::uint64_t steps);

// ---- Memory ----

enum class Role {
  kInput,        // store_bytes into it is reported
  kOutput,       // each byte must be stored by store_bytes, exactly once
  kPlainOutput,  // written by plain stores: no element may keep its poison; see check_outputs
  kInOut,        // stored and loaded at will, without races
  kWorkspace,    // through Workspace<T> and atomics
};

// Zeroed (input) or poisoned memory between guard zones, known by its name. Starts
// `misalignment` bytes after a multiple of 256.
void* allocate_bytes(const std::string& name, std::size_t bytes, Role role,
                     std::size_t misalignment = 0);
template <typename T>
T* allocate(const std::string& name, std::size_t count, Role role, std::size_t misalignment = 0) {
  return static_cast<T*>(allocate_bytes(name, count * sizeof(T), role, misalignment));
}

// Memory of the caller's. `allocate`d memory is registered already. From the first registration on,
// load_bytes, store_bytes, __ldg, Workspace and atomics outside of all regions are reported.
void register_region(const std::string& name, void* pointer, std::size_t bytes, Role role);

// Reports bytes of outputs that no launch wrote since their registration. `element_bytes` is how
// much of a kPlainOutput must differ from the poison: its element size.
void check_outputs(std::size_t element_bytes = 4);

// ---- Reports ----

struct Report {
  std::string kind;    // race, barrier, warp, deadlock, livelock, misaligned, outside, ...
  std::string kernel;  // empty: not from a kernel
  std::string text;    // all of it, with the kind, the kernel, the threads and the seed
};
const std::vector<Report>& reports();
std::string report_text();  // one report per line; empty where there is none
void clear_reports();

// ---- Launches ----

struct LaunchRecord {
  std::string kernel;
  const void* function;
  dim3 grid, block, cluster;  // cluster: 1 x 1 x 1 where the launch has none
  bool clustered, cooperative;
  std::size_t shared_bytes;
  cudaError_t result;
};
const std::vector<LaunchRecord>& launches();
void clear_launches();

// The next launch with clusters, or the next cooperative one, returns `error` and runs nothing.
void refuse_next_cluster_launch(cudaError_t error = cudaErrorLaunchOutOfResources);
void refuse_next_cooperative_launch(cudaError_t error = cudaErrorCooperativeLaunchTooLarge);

// What reports call a kernel, instead of its name in the symbol table.
void name_kernel(const void* kernel, const std::string& name);

// "boost" or "ucontext": what switches between threads.
const char* fibers();

}  // namespace emulator
