#include "runner.h"

#include <emulator/ptx.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace runner {
namespace {

struct Session {
  bool active = false;
  std::uintptr_t stream = 0;
  int allocations = 0;
  int allocations_until_refusal = -1;  // negative: none is refused
  emulator::Role role = emulator::Role::kInOut;
  std::vector<int64_t> output_bytes;  // sizes of tensors that an operator writes once
  std::vector<void*> freed;
  bool pooling = false;
  std::vector<void*> pool;  // data of living blocks
  std::string answer;
};

Session& session() {
  static Session value;
  return value;
}

// Bytes of a pattern that is NaN in every floating dtype, around and in what is allocated.
constexpr size_t kGuard = 256;
constexpr int kPoison = 0xff;

// Its memory is poisoned and registered with the emulator, which reports accesses to anything else.
// What a session frees is kept until the next session, so that a late access never hits memory that
// is in use again.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Session& s = session();
    if (!s.active || bytes == 0) return ordinary_->allocate(bytes);
    if (s.allocations_until_refusal >= 0 && s.allocations_until_refusal-- == 0) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory: ", bytes, " bytes");
    }
    emulator::Role role = s.role;
    for (const int64_t size : s.output_bytes) {
      if (static_cast<int64_t>(bytes) == size) role = emulator::Role::kOutput;
    }
    const std::string name = "tensor " + std::to_string(s.allocations++);
    const size_t all = (bytes + 2 * kGuard + kGuard - 1) / kGuard * kGuard;
    char* block = static_cast<char*>(std::aligned_alloc(kGuard, all));
    std::memset(block, kPoison, all);
    emulator::register_region(name, block + kGuard, bytes, role);
    if (s.pooling) s.pool.push_back(block + kGuard);
    return {block + kGuard, block, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    ordinary_->copy_data(to, from, bytes);
  }
  // This allocator stays installed after a session, and torch may then allocate without a context:
  // such memory comes from the ordinary allocator. Within a session torch refuses to allocate so,
  // because the context of a guarded block is not its address.
  c10::DeleterFnPtr raw_deleter() const override { return ordinary_->raw_deleter(); }

 private:
  static void release(void* block) {
    Session& s = session();
    void* data = static_cast<char*>(block) + kGuard;
    s.pool.erase(std::remove(s.pool.begin(), s.pool.end(), data), s.pool.end());
    s.active ? s.freed.push_back(block) : std::free(block);
  }
  c10::Allocator* ordinary_ = c10::GetDefaultCPUAllocator();
};

const char* answer(std::string text) {
  session().answer = std::move(text);
  return session().answer.c_str();
}

}  // namespace

cudaStream_t current_stream() {
  return reinterpret_cast<cudaStream_t>(session().stream);
}

extern "C" {

RUNNER_API bool runner_begin(const char* architecture, int multiprocessors, uint64_t seed,
                             bool capturing) {
  static Allocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  emulator::start_case();
  emulator::set_seed(seed);
  emulator::set_shuffles_order_memory(false);  // only what CUDA guarantees
  Session& s = session();
  for (void* block : s.freed) std::free(block);
  s.freed.clear();
  s.stream = 0;
  s.pooling = false;
  s.pool.clear();
  s.allocations = 0;
  s.allocations_until_refusal = -1;
  s.role = emulator::Role::kInOut;
  s.output_bytes.clear();
  s.active = true;
  if (capturing) cudaStreamBeginCapture(current_stream(), cudaStreamCaptureModeThreadLocal);
  return emulator::choose_device(architecture, multiprocessors);
}

// The role of tensors that are allocated from now on: a kernel never writes an "input", and may do
// anything with an "inout".
RUNNER_API void runner_role(const char* role) {
  session().role = role == std::string("input") ? emulator::Role::kInput : emulator::Role::kInOut;
}

// Tensors of these sizes that are allocated from now on are outputs: each byte is written once.
RUNNER_API void runner_outputs(const int64_t* bytes, int count) {
  session().output_bytes.assign(bytes, bytes + count);
}

// Tensors are allocated from ordinary memory from now on.
RUNNER_API void runner_end() {
  session().active = false;
}

// ---- Streams, captures, pools: tests/common/emulated_host.py ----

RUNNER_API void runner_stream(int number) {
  session().stream = static_cast<std::uintptr_t>(number) * 16;
}

RUNNER_API void runner_begin_capture() {
  cudaStreamBeginCapture(current_stream(), cudaStreamCaptureModeThreadLocal);
}

// The current stream's capture goes on in the stream of this number too.
RUNNER_API void runner_capture_also(int number) {
  emulator::capture_also(current_stream(),
                         reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(number) * 16));
}

RUNNER_API void* runner_end_capture() {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(current_stream(), &graph);
  return graph;
}

RUNNER_API void runner_destroy_graph(void* graph) {
  cudaGraphDestroy(static_cast<cudaGraph_t>(graph));
}

// What torch allocates from now on is in a graph's pool, or is not.
RUNNER_API void runner_pool(bool pooling) {
  session().pooling = pooling;
}

// The addresses of the pool's living blocks, one a line.
RUNNER_API const char* runner_pool_blocks() {
  std::ostringstream text;
  for (const void* block : session().pool) text << block << '\n';
  return answer(text.str());
}

// The calls of CUDA's runtime that host code has made in this session, one a line.
RUNNER_API const char* runner_calls() {
  std::string text;
  for (const std::string& line : emulator::calls()) text += line + '\n';
  return answer(text);
}

// ---- What happened ----

// The device refuses the next launch with clusters, and the next cooperative one.
RUNNER_API void runner_refuse() {
  emulator::refuse_next_cluster_launch();
  emulator::refuse_next_cooperative_launch();
}
// CUDA's number of an error, which the launch after `others` more ones returns.
RUNNER_API void runner_refuse_launch(int others, int error) {
  emulator::refuse_launch_after(others, static_cast<cudaError_t>(error));
}
// The allocation after `others` more ones throws; none where negative.
RUNNER_API void runner_refuse_allocation(int others) {
  session().allocations_until_refusal = others;
}

// How launches use memory is recorded from now on. l2_bytes: of the L2; 0: the device's own.
RUNNER_API void runner_profile(int l2_bytes) {
  emulator::set_profiled(true);
  emulator::set_l2_bytes(l2_bytes);
}

// A line for each launch since: kernel, stores, those that evict first, and the worst bank conflict
// of accesses of 1, 2, 4, 8 and 16 bytes (emulator::Profile).
RUNNER_API const char* runner_profiles() {
  std::ostringstream text;
  for (const auto& p : emulator::profiles()) {
    text << p.kernel << ' ' << p.stores << ' ' << p.evict_first;
    for (const int ways : p.ways) text << ' ' << ways;
    text << '\n';
  }
  return answer(text.str());
}

// Kernels run as the PTX in this folder; empty: their source. Returns what is wrong with it, or "".
RUNNER_API const char* runner_ptx(const char* folder) {
  try {
    emulator::use_ptx(folder);
    return answer("");
  } catch (const std::exception& error) {
    return answer(error.what());
  }
}
RUNNER_API void runner_ptx_coverage(const char* path) {
  emulator::write_ptx_coverage(path);
}
RUNNER_API void runner_approximation_error(int units) {
  emulator::set_approximation_error(units);
}

RUNNER_API const char* runner_reports() {
  emulator::check_outputs();
  return answer(emulator::report_text());
}

// A line for each launch: kernel, blocks, threads, bytes of shared memory, blocks of a cluster.
RUNNER_API const char* runner_launches() {
  std::ostringstream text;
  for (const auto& launch : emulator::launches()) {
    text << launch.kernel << ' ' << launch.grid.x << ' ' << launch.block.x << ' '
         << launch.shared_bytes << ' ' << launch.cluster.x << '\n';
  }
  return answer(text.str());
}

}  // extern "C"

}  // namespace runner
