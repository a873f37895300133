// The interface for tests: settings, memory, reports, launches. There is one state for the whole
// process; call `reset` before each case.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "host.h"
#include "types.h"

namespace emulator {

// Forgets memory, reports, launches and settings, and frees what `allocate` returned. The device is
// an sm_80 with 8 multiprocessors and the seed 0 again.
void reset();

// The same, but for what host code may rely on after it has done or asked it once: the numbers of
// devices, the attributes of functions, and the addresses of __device__ variables, which are zero
// again.
void start_case();

// ---- The device ----

// Makes the current device one of sm_70, sm_75, sm_80, sm_86, sm_90, sm_120, with their limits per
// block and per multiprocessor. There is no code for sm_70. Returns false if there is no such name.
bool set_device(const std::string& architecture, int multiprocessors = 8);

// The same, but the device gets a number of its own, always the same one: host code that keeps what
// it knows of a device by number stays right.
bool choose_device(const std::string& architecture, int multiprocessors = 8);

// The seed and the number of launches since it was set determine the order in which threads and
// blocks run.
void set_seed(std::uint64_t seed);

// Whether shuffles and votes order memory accesses as __syncwarp does. True is the default; false
// is what CUDA guarantees.
void set_shuffles_order_memory(bool order);

// A livelock is reported after this many scheduling steps, plus 1000 for each thread, in which no
// thread passes a barrier, stores or ends. The default is a million. A loop that neither accesses
// recorded memory nor calls a CUDA function is not interrupted: it hangs.
void set_patience(std::uint64_t steps);

// The size of the L2, in place of the device's own: a small one, which tensors of a test exceed.
void set_l2_bytes(int bytes);

// ---- Memory ----

enum class Role {
  kInput,        // store_bytes into it is reported
  kOutput,       // each byte must be stored by store_bytes, exactly once
  kPlainOutput,  // written by plain stores: every element must change, see check_outputs
  kInOut,        // stored and loaded freely, but without races
  kWorkspace,    // through Workspace<T> and atomics
};

// Memory between guard zones, zeroed (inputs) or poisoned, which reports call by its name. Starts
// `misalignment` bytes after a multiple of 256.
void* allocate_bytes(const std::string& name, std::size_t bytes, Role role,
                     std::size_t misalignment = 0);
template <typename T>
T* allocate(const std::string& name, std::size_t count, Role role, std::size_t misalignment = 0) {
  return static_cast<T*>(allocate_bytes(name, count * sizeof(T), role, misalignment));
}

// Registers memory of the caller; `allocate` registers its own. From the first registration on,
// load_bytes, store_bytes, __ldg, Workspace and atomics outside of all regions are reported.
void register_region(const std::string& name, void* pointer, std::size_t bytes, Role role);

// Reports bytes of outputs that no launch has written since their registration. In a kPlainOutput
// each element of `element_bytes` must differ from the poison.
void check_outputs(std::size_t element_bytes = 4);

// ---- Reports ----

struct Report {
  std::string kind;    // race, barrier, warp, deadlock, livelock, misaligned, outside, ...
  std::string kernel;  // empty if it is not about a kernel
  std::string text;    // complete, with the kind, the kernel, the threads and the seed
};
const std::vector<Report>& reports();
std::string report_text();  // one report per line; empty if there is none
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

// How a launch has used memory. Recorded from `set_profiled(true)` on.
struct Profile {
  std::string kernel;
  std::uint64_t stores;       // by store_bytes and store_bytes_evict_first
  std::uint64_t evict_first;  // by the latter
  // The worst bank conflict of accesses to shared memory of 1, 2, 4, 8 and 16 bytes: how many words
  // of one bank the lanes that are served at once want (32 lanes; 16 of 8 bytes; 8 of 16 bytes).
  // 1: no conflict; 0: no such access. Lanes of a warp access together where they do so from the
  // same place in the code for the same time since the last barrier, shuffle or vote of all lanes.
  int ways[5];
};
void set_profiled(bool on);
const std::vector<Profile>& profiles();

// The next launch with clusters, or the next cooperative one, returns `error` and runs nothing.
void refuse_next_cluster_launch(cudaError_t error = cudaErrorLaunchOutOfResources);
void refuse_next_cooperative_launch(cudaError_t error = cudaErrorCooperativeLaunchTooLarge);
// The launch after `others` more ones that CUDA would take returns `error` and runs nothing.
void refuse_launch_after(int others, cudaError_t error);

// A line for each question to the runtime, and each attribute that was set, since the last reset or
// clear_calls: "cudaDeviceGetAttribute", "cudaFuncSetAttribute kernel attribute value", ...
const std::vector<std::string>& calls();
void clear_calls();

// ---- Captures ----

// The capture of `stream` goes on in `other` too, as after an event.
void capture_also(cudaStream_t stream, cudaStream_t other);

// The name of a kernel in reports, instead of the one in the symbol table.
void name_kernel(const void* kernel, const std::string& name);

// Which library switches between threads: "boost" or "ucontext".
const char* fibers();

}  // namespace emulator
