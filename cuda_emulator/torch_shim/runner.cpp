#include "runner.h"

#include <emulator/ptx.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

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
  bool capturing = false;
  std::uintptr_t stream = 0;
  int allocations = 0;
  emulator::Role role = emulator::Role::kInOut;
  std::vector<int64_t> output_bytes;  // sizes of tensors that an operator writes once
  std::vector<void*> freed;
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
    emulator::Role role = s.role;
    for (const int64_t size : s.output_bytes) {
      if (static_cast<int64_t>(bytes) == size) role = emulator::Role::kOutput;
    }
    const std::string name = "tensor " + std::to_string(s.allocations++);
    const size_t all = (bytes + 2 * kGuard + kGuard - 1) / kGuard * kGuard;
    char* block = static_cast<char*>(std::aligned_alloc(kGuard, all));
    std::memset(block, kPoison, all);
    emulator::register_region(name, block + kGuard, bytes, role);
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
    s.active ? s.freed.push_back(block) : std::free(block);
  }
  c10::Allocator* ordinary_ = c10::GetDefaultCPUAllocator();
};

const char* answer(std::string text) {
  session().answer = std::move(text);
  return session().answer.c_str();
}

}  // namespace

bool is_capturing() {
  return session().capturing;
}

cudaStream_t current_stream() {
  return reinterpret_cast<cudaStream_t>(session().stream);
}

extern "C" {

#define RUNNER_API __attribute__((visibility("default")))

RUNNER_API bool runner_begin(const char* architecture, int multiprocessors, uint64_t seed,
                             bool capturing) {
  static Allocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  emulator::reset();
  emulator::set_seed(seed);
  emulator::set_shuffles_order_memory(false);  // only what CUDA guarantees
  Session& s = session();
  for (void* block : s.freed) std::free(block);
  s.freed.clear();
  s.stream += 16;
  s.capturing = capturing;
  s.allocations = 0;
  s.role = emulator::Role::kInOut;
  s.output_bytes.clear();
  s.active = true;
  return emulator::set_device(architecture, multiprocessors);
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

// The device refuses the next launch with clusters, and the next cooperative one.
RUNNER_API void runner_refuse() {
  emulator::refuse_next_cluster_launch();
  emulator::refuse_next_cooperative_launch();
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
