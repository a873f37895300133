// Devices and their limits per compute capability, from the CUDA programming guide.
#include <algorithm>
#include <vector>

#include "machine.h"
#include "profile.h"
#include "settings.h"

namespace emulator {
namespace detail {
namespace {

constexpr int kKilo = 1024;
const Device kDevices[] = {
    {"sm_70", 7, 0, 96 * kKilo, 96 * kKilo, 0, 256, 2048, 32, 6144 * kKilo, false, false},
    {"sm_75", 7, 5, 64 * kKilo, 64 * kKilo, 0, 256, 1024, 16, 4096 * kKilo, false},
    {"sm_80", 8, 0, 164 * kKilo, 163 * kKilo, kKilo, 128, 2048, 32, 40960 * kKilo, false},
    {"sm_86", 8, 6, 100 * kKilo, 99 * kKilo, kKilo, 128, 1536, 16, 6144 * kKilo, false},
    {"sm_90", 9, 0, 228 * kKilo, 227 * kKilo, kKilo, 128, 2048, 32, 51200 * kKilo, true},
    {"sm_120", 12, 0, 100 * kKilo, 99 * kKilo, kKilo, 128, 1536, 24, 98304 * kKilo, true},
};

const Device* find_device(const std::string& name) {
  for (const Device& device : kDevices) {
    if (name == device.name) return &device;
  }
  return nullptr;
}

Settings fresh_settings() {
  Settings s;
  s.device = find_device("sm_80");
  return s;
}

// The devices that have a number, from 1 on.
struct Numbered {
  const Device* device;
  int multiprocessors;
  int l2_bytes;  // 0: the device's own
};
std::vector<Numbered>& numbered() {
  static std::vector<Numbered> all;
  return all;
}
bool is_numbered(int number) {
  return number > 0 && number <= static_cast<int>(numbered().size());
}

// The device that is set has this number from now on. Host code may ask a device once and remember
// its limits, so devices that differ in one have different numbers.
void number_device() {
  Settings& set = settings();
  auto& all = numbered();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& n) {
    return n.device == set.device && n.multiprocessors == set.multiprocessors &&
           n.l2_bytes == set.l2_bytes;
  });
  set.device_number = static_cast<int>(found - all.begin()) + 1;
  if (found == all.end()) all.push_back({set.device, set.multiprocessors, set.l2_bytes});
}

std::vector<std::string>& call_lines() {
  static std::vector<std::string> all;
  return all;
}

}  // namespace

void note_call(const std::string& line) {
  call_lines().push_back(line);
}

Settings& settings() {
  static Settings current_settings = fresh_settings();
  return current_settings;
}

}  // namespace detail

void start_case() {
  detail::settings() = detail::fresh_settings();
  detail::forget_captures();
  detail::forget_regions();
  detail::register_symbols();
  cudaGetLastError();
  clear_reports();
  clear_launches();
  clear_calls();
  detail::forget_profiles();
}

void reset() {
  detail::forget_symbols();
  detail::forget_functions();
  detail::numbered().clear();
  start_case();
}

bool set_device(const std::string& architecture, int multiprocessors) {
  const detail::Device* device = detail::find_device(architecture);
  if (device == nullptr) return false;
  detail::settings().device = device;
  detail::settings().multiprocessors = multiprocessors;
  return true;
}

bool choose_device(const std::string& architecture, int multiprocessors) {
  if (!set_device(architecture, multiprocessors)) return false;
  detail::number_device();
  return true;
}

const std::vector<std::string>& calls() {
  return detail::call_lines();
}
void clear_calls() {
  detail::call_lines().clear();
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
  if (detail::settings().device_number != 0) detail::number_device();
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
void refuse_launch_after(int others, cudaError_t error) {
  detail::settings().launches_until_refusal = others;
  detail::settings().refuse_any = error;
}
const char* fibers() {
  return detail::Fiber::kind();
}

}  // namespace emulator

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto& settings = emulator::detail::settings();
  if (device != settings.device_number) return cudaErrorInvalidDevice;
  const auto& d = *settings.device;
  emulator::detail::note_call("cudaDeviceGetAttribute");
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
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 0;  // it has no rates
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
  *device = emulator::detail::settings().device_number;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  auto& settings = emulator::detail::settings();
  if (device == settings.device_number) return cudaSuccess;
  if (!emulator::detail::is_numbered(device)) return cudaErrorInvalidDevice;
  const auto& chosen = emulator::detail::numbered()[static_cast<std::size_t>(device - 1)];
  settings.device = chosen.device;
  settings.multiprocessors = chosen.multiprocessors;
  settings.l2_bytes = chosen.l2_bytes;
  settings.device_number = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(emulator::detail::numbered().size()) + 1;
  return cudaSuccess;
}
