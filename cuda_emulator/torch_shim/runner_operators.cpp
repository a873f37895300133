// The operators with the CUDA kernels behind them, on CPU tensors: registered for a dispatch key of
// their own, beside the installed ones. This library has its own copy of csrc/backend.cpp, hence
// its own table of backends.
#include "runner.h"

#include <backend.h>
#include <collectives.h>
#include <cuda/semaphores.h>

#include <exception>

TORCH_LIBRARY_IMPL(bnorm_ext, PrivateUse1, m) {
  bnorm_ext::register_operators(m, c10::DeviceType::CPU, bnorm_ext::cuda::backend());
}

extern "C" {

RUNNER_API void runner_beside_collectives(bool beside) {
  bnorm_ext::beside_collectives = beside;
}

// 1, 0, or -1 where it throws.
RUNNER_API int runner_has_code() {
  try {
    return bnorm_ext::cuda::has_code() ? 1 : 0;
  } catch (const std::exception&) {
    return -1;
  }
}

// The address of what a launch that needs `count` words would get now.
RUNNER_API const void* runner_words(int64_t count, bool phases) {
  using namespace bnorm_ext::cuda;
  const auto use = phases ? SemaphoreUse::Phases : SemaphoreUse::Semaphores;
  return SemaphoreMemory(count, at::TensorOptions(), use).words();
}

}  // extern "C"
