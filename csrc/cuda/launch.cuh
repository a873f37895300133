// Launching a kernel: the only place where the grid, its attributes and the instantiation for
// dtype, width and mapping are chosen.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "params.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// What the kernels that iterate over a tensor are compiled for.
template <typename T_, int kWidth_, Mapping kMapping_>
struct Variant {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr Mapping kMapping = kMapping_;
};

// Calls f(Variant<...>{}) with the variant that serves this call. kWidest: bytes of the largest
// type that f is compiled for.
template <int kWidest = 8, typename F>
cudaError_t with_variant(DType dtype, const TilePlan& plan, F f) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(T));
    const bool is_full = plan.width != 1;
    switch (plan.mapping) {
      case Mapping::ChannelsLast:
        return is_full ? f(Variant<T, kFull, Mapping::ChannelsLast>{})
                       : f(Variant<T, 1, Mapping::ChannelsLast>{});
      case Mapping::ChannelGroups:
        if constexpr (sizeof(T) <= 4) return f(Variant<T, kFull, Mapping::ChannelGroups>{});
        return cudaErrorInvalidValue;
      default:
        return is_full ? f(Variant<T, kFull, Mapping::ChannelsFirst>{})
                       : f(Variant<T, 1, Mapping::ChannelsFirst>{});
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

constexpr int kSharedWithoutOptIn = 48 * 1024;
constexpr int kPortableCluster = 8;  // blocks

// The configuration of a launch of teams. Attributes of the kernel are set before every launch:
// caching that they are set would need one cache per CUDA context.
class TeamLaunch {
 public:
  template <typename Params>
  TeamLaunch(void (*kernel)(Params), Path path, int team, int shared_bytes, int64_t blocks) {
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.blockDim = dim3(kThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    if (shared_bytes > kSharedWithoutOptIn) {
      error_ =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    if (path == Path::Cluster) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim.x = static_cast<unsigned>(team);
      attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;
      if (team > kPortableCluster && error_ == cudaSuccess) {
        error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      }
    } else if (path == Path::Grid) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    } else {
      return;
    }
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  TeamLaunch(const TeamLaunch&) = delete;
  TeamLaunch& operator=(const TeamLaunch&) = delete;

  cudaError_t error() const { return error_; }
  cudaLaunchConfig_t& config() { return config_; }

 private:
  cudaError_t error_ = cudaSuccess;
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

template <typename Params>
cudaError_t launch_teams(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  const ResidentPlan& plan = params.plan;
  if (plan.blocks() > INT32_MAX) return cudaErrorInvalidConfiguration;
  TeamLaunch launch(kernel, plan.path, static_cast<int>(plan.tile_plan.chunks), plan.shared_bytes,
                    plan.blocks());
  if (launch.error() != cudaSuccess) return launch.error();
  launch.config().stream = stream;
  return cudaLaunchKernelEx(&launch.config(), kernel, params);
}

// How many blocks of the kernel, or clusters of `team` blocks, the current device holds at once; 0
// where it cannot say.
template <typename Params>
int64_t co_resident(void (*kernel)(Params), Path path, int team, int shared_bytes) {
  TeamLaunch launch(kernel, path, team, shared_bytes, team);
  int count = 0, device = 0, multiprocessors = 0;
  cudaError_t error = launch.error();
  if (error == cudaSuccess && path == Path::Cluster) {
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config());
    multiprocessors = 1;
  } else if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads,
                                                          static_cast<size_t>(shared_bytes));
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
  }
  if (error == cudaSuccess) return int64_t{count} * multiprocessors;
  cudaGetLastError();  // clears the error, which the next caller would see
  return 0;
}

}  // namespace cuda
}  // namespace bnorm_ext
