#include "semaphores.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <tuple>

namespace bnorm_ext {
namespace cuda {

at::Tensor semaphores(int64_t count, const at::TensorOptions& options, SemaphoreUse use) {
  const auto ints = options.dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return at::zeros({count}, ints);
  }
  // Never destroyed, because at exit the CUDA context may be destroyed first.
  static auto* kept = new std::map<std::tuple<int, cudaStream_t, SemaphoreUse>, at::Tensor>();
  static auto* mutex = new std::mutex();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const std::lock_guard<std::mutex> lock(*mutex);
  at::Tensor& zeros = (*kept)[{c10::cuda::current_device(), stream, use}];
  // Rounded up, so that networks of many widths allocate only a few times.
  constexpr int64_t kStep = 4096;
  if (!zeros.defined() || zeros.numel() < count) {
    zeros = at::zeros({(count + kStep - 1) / kStep * kStep}, ints);
  }
  return zeros;
}

}  // namespace cuda
}  // namespace bnorm_ext
