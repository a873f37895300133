// Launching a kernel: the only place where the grid, its attributes and the instantiation for
// dtype, width and mapping are chosen.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <atomic>
#include <type_traits>

#include "params.h"
#include "per_device.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// What the kernels that iterate over a tensor are compiled for. kPlain: there is neither an activation
// nor a residual nor a mask, and the code for them is left out, which takes most of the registers.
template <typename T_, int kWidth_, Mapping kMapping_, bool kPlain_ = false>
struct Variant {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr Mapping kMapping = kMapping_;
  static constexpr bool kPlain = kPlain_;
};

// Calls f(Variant<...>{}) with the variant that serves this call. kWidest: bytes of the largest type
// that f is compiled for. `plain`: kPlain, for which only wide accesses of up to 32-bit values are
// compiled, and none if !kHasPlain.
template <int kWidest, bool kHasPlain, typename F>
cudaError_t with_variant(DType dtype, const TilePlan& plan, bool plain, F f) {
  const auto of_mapping = [&](auto zero, auto mapping) {
    using T = decltype(zero);
    constexpr Mapping kMapping = decltype(mapping)::value;
    constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(T));
    if constexpr (kMapping != Mapping::ChannelGroups) {
      if (plan.width == 1) return f(Variant<T, 1, kMapping>{});
    }
    if constexpr (kHasPlain && sizeof(T) <= 4) {
      if (plain) return f(Variant<T, kFull, kMapping, true>{});
    }
    return f(Variant<T, kFull, kMapping>{});
  };
  const auto of_type = [&](auto zero) {
    switch (plan.mapping) {
      case Mapping::ChannelsLast:
        return of_mapping(zero, std::integral_constant<Mapping, Mapping::ChannelsLast>{});
      case Mapping::ChannelGroups:
        if constexpr (sizeof(zero) <= 4) {
          return of_mapping(zero, std::integral_constant<Mapping, Mapping::ChannelGroups>{});
        }
        return cudaErrorInvalidValue;
      default:
        return of_mapping(zero, std::integral_constant<Mapping, Mapping::ChannelsFirst>{});
    }
  };
  switch (dtype) {
    case DType::Float:
      return of_type(float{});
    case DType::Double:
      if constexpr (kWidest == 8) return of_type(double{});
      return cudaErrorInvalidValue;
    case DType::Half:
      return of_type(c10::Half{});
    default:
      return of_type(c10::BFloat16{});
  }
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t blocks, int shared_bytes,
                   cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// A kernel whose blocks work in teams: its launches, and how many of them the device has room for.
// One static object for each kernel.
template <typename Params>
class TeamKernel {
 public:
  using Kernel = void (*)(Params);
  explicit TeamKernel(Kernel kernel) : kernel_(kernel) {}

  cudaError_t launch(const Params& params, cudaStream_t stream) {
    const ResidentPlan& plan = params.plan;
    if (plan.blocks() > INT32_MAX) return cudaErrorInvalidConfiguration;
    int device = 0;
    const cudaError_t error = prepare(&device);
    if (error != cudaSuccess) return error;
    Config config(plan.path, static_cast<int>(plan.tile_plan.chunks), plan.shared_bytes,
                  plan.blocks());
    config.launch.stream = stream;
    return cudaLaunchKernelEx(&config.launch, kernel_, params);
  }

  // How many blocks, or clusters of `team` blocks, the current device holds at once; 0 where it
  // cannot say.
  int64_t co_resident(Path path, int team, int shared_bytes) {
    int count = 0, device = 0, multiprocessors = 1;
    cudaError_t error = prepare(&device);
    if (error == cudaSuccess && path == Path::Cluster) {
      const Config config(path, team, shared_bytes, team);
      error = cudaOccupancyMaxActiveClusters(&count, kernel_, &config.launch);
    } else if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel_, kThreads,
                                                            static_cast<size_t>(shared_bytes));
      if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      }
    }
    if (error == cudaSuccess) return int64_t{count} * multiprocessors;
    cudaGetLastError();  // clears the error, which the next caller would see
    return 0;
  }

 private:
  struct Config {
    cudaLaunchConfig_t launch = {};
    cudaLaunchAttribute attribute = {};

    Config(Path path, int team, int shared_bytes, int64_t blocks) {
      launch.gridDim = dim3(static_cast<unsigned>(blocks));
      launch.blockDim = dim3(kThreads);
      launch.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
      if (path == Path::Cluster) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(team);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      } else if (path == Path::Grid) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
      } else {
        return;
      }
      launch.attrs = &attribute;
      launch.numAttrs = 1;
    }
    Config(const Config&) = delete;
    Config& operator=(const Config&) = delete;
  };

  // Once on each device: lets the kernel have all the shared memory that a block can have, and
  // clusters of more than the 8 blocks that every device grants. Always the most, never what a
  // launch needs: the limits belong to the kernel, and other threads launch it meanwhile.
  cudaError_t prepare(int* device) {
    cudaError_t error = cudaGetDevice(device);
    if (error != cudaSuccess || prepared_[*device].load(std::memory_order_acquire)) return error;
    int shared_bytes = 0, clusters = 0;
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, *device);
    if (error != cudaSuccess) return error;
    error =
        cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, *device);
    if (error == cudaSuccess && clusters != 0) {
      error = cudaFuncSetAttribute(kernel_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error == cudaSuccess) prepared_[*device].store(true, std::memory_order_release);
    return error;
  }

  Kernel kernel_;
  std::atomic<bool> prepared_[kMostDevices] = {};
};

}  // namespace cuda
}  // namespace bnorm_ext
