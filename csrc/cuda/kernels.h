// The kernels' host side: each launches on `stream` of the current device and returns the launch's
// error. Defined in the .cu file of the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace bnorm_ext {
namespace cuda {

// forward.cu
cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream);
cudaError_t launch_normalise(const NormaliseParams& p, cudaStream_t stream);
// backward.cu
cudaError_t launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream);
cudaError_t launch_backward_apply(const BackwardApplyParams& p, cudaStream_t stream);
// merge.cu
cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace bnorm_ext
