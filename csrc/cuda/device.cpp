#include "device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include "../backend.h"
#include "kernels.h"
#include "per_device.h"
#include "residency.h"

namespace bnorm_ext {
namespace cuda {
namespace {

std::unique_ptr<DeviceLimits> ask_limits() {
  const int device = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  auto limits = std::make_unique<DeviceLimits>();
  limits->multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits->shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits->shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits->max_cluster = attribute(cudaDevAttrClusterLaunch) != 0 ? kLargestCluster : 1;
  limits->cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  limits->l2_bytes = attribute(cudaDevAttrL2CacheSize);
  limits->clock_mhz = attribute(cudaDevAttrClockRate) / 1000;
  // kHz and bits; memory transfers at both edges of its clock.
  const int64_t memory_khz = attribute(cudaDevAttrMemoryClockRate);
  const int64_t bits = attribute(cudaDevAttrGlobalMemoryBusWidth);
  limits->gigabytes_per_second = static_cast<int>(2 * memory_khz * (bits / 8) / 1000000);
  return limits;
}

// What CUDA says where the build has no code for a device: nothing that fits, or only PTX that is
// newer than the driver.
bool is_missing_code(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return true;
    default:
      return false;
  }
}

std::unique_ptr<bool> ask_for_code() {
  // The first question about a kernel may load it, which a capture in progress would forbid.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  const cudaError_t error = find_code();
  if (!is_missing_code(error)) {
    C10_CUDA_CHECK(error);
    return std::make_unique<bool>(true);
  }
  cudaGetLastError();  // not the next caller's
  return std::make_unique<bool>(false);
}

}  // namespace

const DeviceLimits& limits() {
  static PerDevice<DeviceLimits> known;
  return known.get(c10::cuda::current_device(), ask_limits);
}

bool has_code() {
  static PerDevice<bool> known;
  return known.get(c10::cuda::current_device(), ask_for_code);
}

}  // namespace cuda
}  // namespace bnorm_ext
