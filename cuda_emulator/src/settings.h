// The settings that the harness chose.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/harness.h"

namespace emulator {
namespace detail {

struct Device {
  const char* name;
  int major, minor;
  int shared_per_sm;       // bytes
  int shared_per_block;    // with the opt-in; 48 KB without
  int reserved_per_block;  // bytes that the system takes of each block's shared memory
  int shared_granularity;  // bytes
  int threads_per_sm;
  int blocks_per_sm;
  int l2_bytes;
  bool clusters;
  bool has_code = true;  // whether kernels count as compiled for it
};

struct Settings {
  const Device* device;
  int multiprocessors = 8;
  int device_number = 0;
  std::uint64_t seed = 0;
  std::uint64_t launches = 0;  // since the seed was set
  std::uint64_t patience = 1000000;
  bool shuffles_order_memory = true;
  bool profiled = false;
  int l2_bytes = 0;  // 0: the device's own
  cudaError_t refuse_cluster = cudaSuccess;
  cudaError_t refuse_cooperative = cudaSuccess;
  int launches_until_refusal = 0;  // counts while refuse_any is an error
  cudaError_t refuse_any = cudaSuccess;
};
Settings& settings();

constexpr int kThreadsPerBlock = 1024;
constexpr int kSharedWithoutOptIn = 48 * 1024;

void forget_regions();
void forget_functions();
void forget_symbols();
void forget_captures();
void register_symbols();
void note_call(const std::string& line);
void check_guards();
std::string name_of_kernel(const void* kernel);
// Of a mangled name: "void (anonymous namespace)::kernel<4>(Params)" -> "kernel<4>".
std::string short_name(const std::string& mangled);

}  // namespace detail
}  // namespace emulator
