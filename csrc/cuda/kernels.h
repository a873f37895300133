// The host side of the kernels: each function launches on `stream` of the current device and
// returns the error of the launch. Each is defined in the .cu file of its kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace bnorm_ext {
namespace cuda {

// two_pass_forward.cu
cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream);
cudaError_t launch_normalise(const NormaliseParams& p, cudaStream_t stream);
// two_pass_backward.cu
cudaError_t launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream);
cudaError_t launch_backward_apply(const BackwardApplyParams& p, cudaStream_t stream);
// resident_forward.cu, resident_backward.cu. resident_*_blocks: how many blocks of the kernel, or
// clusters of `team` blocks, the current device holds at once.
cudaError_t launch_resident_forward(const ResidentForwardParams& p, cudaStream_t stream);
cudaError_t launch_resident_backward(const ResidentBackwardParams& p, cudaStream_t stream);
int64_t resident_forward_blocks(DType dtype, const TilePlan& tile_plan, bool plain, Path path,
                                int team, int shared_bytes);
int64_t resident_backward_blocks(DType dtype, const TilePlan& tile_plan, bool plain, Path path,
                                 int team, int shared_bytes);
// merge.cu
cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream);
// Success where this build has code for the current device.
cudaError_t find_code();

// semaphore_words.cu: two arrays in the memory of the current device, which begin as zeros.
constexpr int64_t kSemaphoreWords = int64_t{1} << 20;
constexpr int64_t kPhaseWords = int64_t{1} << 17;
cudaError_t find_semaphore_words(unsigned** begin);
cudaError_t find_phase_words(unsigned** begin);

}  // namespace cuda
}  // namespace bnorm_ext
