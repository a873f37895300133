// Launches: which ones CUDA refuses, the queries before a launch, and the call of the scheduler.
#include <algorithm>
#include <cstring>
#include <map>

#include "engine.h"
#include "machine.h"
#include "profile.h"
#include "settings.h"

namespace emulator {
namespace detail {
namespace {

struct Function {
  int shared_limit = kSharedWithoutOptIn;
  bool wide_clusters = false;
};
std::map<const Device*, std::map<const void*, Function>>& functions_of_devices() {
  static std::map<const Device*, std::map<const void*, Function>> all;
  return all;
}
std::map<const void*, Function>& functions() {
  return functions_of_devices()[settings().device];
}
std::vector<LaunchRecord>& records() {
  static std::vector<LaunchRecord> all;
  return all;
}
cudaError_t last_error = cudaSuccess;
Engine engine = nullptr;

constexpr unsigned kPortableCluster = 8;
constexpr unsigned kWideCluster = 16;

int blocks_per_sm(std::uint64_t threads, std::size_t shared) {
  const Device& d = *settings().device;
  const std::size_t unit = static_cast<std::size_t>(d.shared_granularity);
  const std::size_t taken =
      (shared + static_cast<std::size_t>(d.reserved_per_block) + unit - 1) / unit * unit;
  std::uint64_t blocks = static_cast<std::uint64_t>(d.blocks_per_sm);
  const std::uint64_t rounded = (threads + 31) / 32 * 32;
  blocks = std::min(blocks, static_cast<std::uint64_t>(d.threads_per_sm) / rounded);
  if (taken > 0) blocks = std::min(blocks, static_cast<std::uint64_t>(d.shared_per_sm) / taken);
  return static_cast<int>(blocks);
}

int resident_clusters(const Launch& launch) {
  const int blocks = blocks_per_sm(volume(launch.block), launch.shared_bytes);
  return static_cast<int>(static_cast<std::uint64_t>(blocks) *
                          static_cast<std::uint64_t>(settings().multiprocessors) /
                          volume(launch.cluster));
}

void read_attributes(const cudaLaunchConfig_t& config, Launch& launch) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) launch.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension) {
      launch.clustered = true;
      launch.cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    }
  }
}

// Checks block, grid and shared memory, but not the cluster.
cudaError_t check_shape(const Launch& launch, const Function& function) {
  const dim3& b = launch.block;
  const dim3& g = launch.grid;
  const Device& d = *settings().device;
  if (volume(b) == 0 || b.x > 1024 || b.y > 1024 || b.z > 64 || volume(b) > kThreadsPerBlock) {
    return cudaErrorInvalidConfiguration;
  }
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes > static_cast<std::size_t>(function.shared_limit) ||
      launch.shared_bytes > static_cast<std::size_t>(d.shared_per_block)) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t check_cluster(const Launch& launch, const Function& function) {
  if (!launch.clustered) return cudaSuccess;
  const dim3& c = launch.cluster;
  if (!settings().device->clusters) return cudaErrorNotSupported;
  const std::uint64_t size = volume(c);
  if (size == 0 || size > (function.wide_clusters ? kWideCluster : kPortableCluster)) {
    return cudaErrorInvalidClusterSize;
  }
  if (launch.grid.x % c.x != 0 || launch.grid.y % c.y != 0 || launch.grid.z % c.z != 0) {
    return cudaErrorInvalidConfiguration;
  }
  return resident_clusters(launch) == 0 ? cudaErrorLaunchOutOfResources : cudaSuccess;
}

cudaError_t take(cudaError_t& refusal) {
  const cudaError_t error = refusal;
  refusal = cudaSuccess;
  return error;
}

cudaError_t check(const Launch& launch, const Function& function) {
  if (launch.body == nullptr) return cudaErrorInvalidDeviceFunction;
  if (!settings().device->has_code) return cudaErrorNoKernelImageForDevice;
  cudaError_t error = check_shape(launch, function);
  if (error == cudaSuccess) error = check_cluster(launch, function);
  if (error == cudaSuccess && launch.clustered) error = take(settings().refuse_cluster);
  if (error == cudaSuccess && launch.cooperative) error = take(settings().refuse_cooperative);
  if (error != cudaSuccess) return error;
  const auto resident = static_cast<std::uint64_t>(resident_clusters(launch));
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  if (launch.cooperative && volume(launch.grid) > resident * volume(launch.cluster)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  Settings& s = settings();
  if (s.refuse_any != cudaSuccess && s.launches_until_refusal-- == 0) return take(s.refuse_any);
  return cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

void set_engine(Engine chosen) {
  engine = chosen;
}

void forget_functions() {
  functions_of_devices().clear();
  last_error = cudaSuccess;
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Function& function = functions()[kernel];
  note_call("cudaFuncSetAttribute " + name_of_kernel(kernel) + " " +
            std::to_string(static_cast<int>(attribute)) + " " + std::to_string(value));
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > settings().device->shared_per_block) {
        return remember(cudaErrorInvalidValue);
      }
      function.shared_limit = std::max(value, 0);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      function.wide_clusters = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t get_function_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  note_call("cudaFuncGetAttributes");
  *attributes = cudaFuncAttributes{};
  if (!settings().device->has_code) return remember(cudaErrorNoKernelImageForDevice);
  attributes->maxThreadsPerBlock = kThreadsPerBlock;
  attributes->numRegs = 32;
  attributes->maxDynamicSharedSizeBytes = functions()[kernel].shared_limit;
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* blocks, const void* kernel, int threads, std::size_t shared) {
  note_call("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (threads <= 0) return remember(cudaErrorInvalidValue);
  const bool fits = threads <= kThreadsPerBlock &&
                    shared <= static_cast<std::size_t>(settings().device->shared_per_block) &&
                    shared <= static_cast<std::size_t>(functions()[kernel].shared_limit);
  *blocks = fits ? blocks_per_sm(static_cast<std::uint64_t>(threads), shared) : 0;
  return cudaSuccess;
}

static Launch describe_launch(const cudaLaunchConfig_t& config) {
  Launch launch;
  launch.grid = config.gridDim;
  launch.block = config.blockDim;
  launch.shared_bytes = config.dynamicSmemBytes;
  read_attributes(config, launch);
  return launch;
}

cudaError_t max_active_clusters(int* clusters, const void* kernel,
                                const cudaLaunchConfig_t* config) {
  note_call("cudaOccupancyMaxActiveClusters");
  const Launch launch = describe_launch(*config);
  const Function& function = functions()[kernel];
  *clusters = 0;
  cudaError_t error = check_shape(launch, function);
  if (error == cudaSuccess) error = check_cluster(launch, function);
  if (error == cudaErrorLaunchOutOfResources) return cudaSuccess;
  if (error != cudaSuccess) return remember(error);
  *clusters = resident_clusters(launch);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, void (*body)(void*),
                   void* context, const std::vector<Argument>& arguments) {
  Launch launch = describe_launch(*config);
  launch.kernel = name_of_kernel(kernel);
  launch.body = kernel == nullptr ? nullptr : body;
  launch.context = context;
  cudaError_t error = check(launch, functions()[kernel]);
  if (error == cudaSuccess && engine != nullptr) error = engine(launch, arguments);
  const std::size_t index = records().size();
  records().push_back({launch.kernel, kernel, launch.grid, launch.block, launch.cluster,
                       launch.clustered, launch.cooperative, launch.shared_bytes, error});
  if (error != cudaSuccess) return remember(error);
  Settings& s = settings();
  ++s.launches;
  begin_profile(launch.kernel);
  run_launch(launch, s.seed * 1000003u + s.launches, resident_clusters(launch));
  end_profile();
  // A real launch fails later, at the next call that synchronises with it.
  if (launch.aborted) error = cudaErrorLaunchFailure;
  running = &launch;
  check_guards();
  running = nullptr;
  records()[index].result = error;
  return remember(error);
}

}  // namespace detail

const std::vector<LaunchRecord>& launches() {
  return detail::records();
}
void clear_launches() {
  detail::records().clear();
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::detail::last_error;
  emulator::detail::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return emulator::detail::last_error;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
