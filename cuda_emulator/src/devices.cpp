// Devices and their limits per compute capability, from the CUDA programming guide.
#include <algorithm>

#include "machine.h"
#include "profile.h"
#include "settings.h"

namespace emulator {
namespace detail {
namespace {

constexpr int kKilo = 1024;
const Device kDevices[] = {
    {"sm_75", 7, 5, 64 * kKilo, 64 * kKilo, 0, 256, 1024, 16, 4096 * kKilo, false},
    {"sm_80", 8, 0, 164 * kKilo, 163 * kKilo, kKilo, 128, 2048, 32, 40960 * kKilo, false},
    {"sm_86", 8, 6, 100 * kKilo, 99 * kKilo, kKilo, 128, 1536, 16, 6144 * kKilo, false},
    {"sm_90", 9, 0, 228 * kKilo, 227 * kKilo, kKilo, 128, 2048, 32, 51200 * kKilo, true},
    {"sm_120", 12, 0, 100 * kKilo, 99 * kKilo, kKilo, 128, 1536, 24, 98304 * kKilo, true},
};

Settings fresh_settings() {
  Settings s;
  s.device = &kDevices[1];
  return s;
}

}  // namespace

Settings& settings() {
  static Settings current_settings = fresh_settings();
  return current_settings;
}

}  // namespace detail

void reset() {
  detail::settings() = detail::fresh_settings();
  detail::forget_regions();
  detail::forget_functions();
  clear_reports();
  clear_launches();
  detail::forget_profiles();
}

bool set_device(const std::string& architecture, int multiprocessors) {
  for (const detail::Device& device : detail::kDevices) {
    if (architecture != device.name) continue;
    detail::settings().device = &device;
    detail::settings().multiprocessors = multiprocessors;
    return true;
  }
  return false;
}

void set_seed(std::uint64_t seed) {
  detail::settings().seed = seed;
  detail::settings().launches = 0;
}
void set_shuffles_order_memory(bool order) {
  detail::settings().shuffles_order_memory = order;
}
void set_l2_bytes(int bytes) {
  detail::settings().l2_bytes = bytes;
}
void set_profiled(bool on) {
  detail::settings().profiled = on;
}
void set_patience(std::uint64_t steps) {
  detail::settings().patience = steps;
}
void refuse_next_cluster_launch(cudaError_t error) {
  detail::settings().refuse_cluster = error;
}
void refuse_next_cooperative_launch(cudaError_t error) {
  detail::settings().refuse_cooperative = error;
}
const char* fibers() {
  return detail::Fiber::kind();
}

}  // namespace emulator

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  const auto& settings = emulator::detail::settings();
  const auto& d = *settings.device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *value = emulator::detail::kThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxBlockDimZ:
      *value = 64;
      return cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      return cudaSuccess;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = emulator::detail::kSharedWithoutOptIn;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = settings.l2_bytes != 0 ? settings.l2_bytes : d.l2_bytes;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_sm;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_per_sm;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = d.blocks_per_sm;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = d.reserved_per_block;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = d.clusters;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
