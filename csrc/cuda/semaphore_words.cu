// The memory of semaphores.h: zero from the moment at which the device loads this file's code.
#include "kernels.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

__device__ unsigned semaphore_words[kSemaphoreWords];
__device__ unsigned phase_words[kPhaseWords];

template <typename Words>
cudaError_t find(const Words& words, unsigned** begin) {
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, words);
  *begin = static_cast<unsigned*>(address);
  return error;
}

}  // namespace

cudaError_t find_semaphore_words(unsigned** begin) {
  return find(semaphore_words, begin);
}
cudaError_t find_phase_words(unsigned** begin) {
  return find(phase_words, begin);
}

}  // namespace cuda
}  // namespace bnorm_ext
