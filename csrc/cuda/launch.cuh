// Launching a kernel: the one place where a grid, its attributes and the instantiation for a dtype,
// width and layout are chosen.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "params.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// What the kernels that walk a tensor are compiled for.
template <typename T_, int kWidth_, bool kLast_>
struct Variant {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kLast = kLast_;
};

// f(Variant<...>{}) for the one that serves this call.
template <typename F>
cudaError_t with_variant(DType dtype, const TwoPassPlan& plan, Layout layout, F f) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(T));
    if (layout == Layout::ChannelsLast) {
      return plan.width == 1 ? f(Variant<T, 1, true>{}) : f(Variant<T, kFull, true>{});
    }
    return plan.width == 1 ? f(Variant<T, 1, false>{}) : f(Variant<T, kFull, false>{});
  };
  switch (dtype) {
    case DType::Float:
      return of_type(float{});
    case DType::Double:
      return of_type(double{});
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

}  // namespace cuda
}  // namespace bnorm_ext
