// Merges the statistics of several processes.
#include "channel.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Formula    n = sum(count), mean = sum(count * mean) / n,
//            var = sum(count * (var + (mean_w - mean)^2)) / n; rstd and running statistics follow
//            (Chan, Golub and LeVeque 1983)
// Shapes     mean, var [W, C], count [W]; results [C]
// Mapping    a thread per channel, processes in order
// Bytes      reads 16 * W * C
// Numerics   in double, relative to the mean of the first process that has values, so that equal
//            means cancel exactly
__global__ void __launch_bounds__(kThreads) merge_kernel(MergeParams p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.C) return;
  double n = 0, anchor = 0;
  Pair sums = {0, 0};  // of the deviations from the anchor and of their squares
  for (int64_t w = 0; w < p.W; ++w) {
    const double count = load_one(p.count + w);
    const double mean = load_one(p.mean + w * p.C + c), var = load_one(p.var + w * p.C + c);
    if (!(count > 0)) continue;
    if (n == 0 && is_finite(mean)) anchor = mean;
    n += count;
    sums.a += count * (mean - anchor);
    sums.b += count * (var + (mean - anchor) * (mean - anchor));
  }
  const double delta = sums.a / n, mean = anchor + delta, var = variance_of(sums, 1 / n);
  const double rstd = 1.0 / sqrt(var + p.eps);
  if (p.dtype == DType::Double) {
    store_mean(p.merged_mean, p.C, c, split_mean<double>(anchor, delta));
    store_one(static_cast<double*>(p.merged_rstd) + c, rstd);
  } else {
    store_mean(p.merged_mean, p.C, c, split_mean<float>(anchor, delta));
    store_one(static_cast<float*>(p.merged_rstd) + c, static_cast<float>(rstd));
  }
  update_running(p.running, c, mean, var, n);
}

__global__ void count_batch_kernel(int64_t* num_batches_tracked) {
  if (threadIdx.x == 0) ++*num_batches_tracked;
}

}  // namespace

cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream) {
  const cudaError_t error =
      launch(merge_kernel, p, ceil_div(p.C, kThreads), /*shared_bytes=*/0, stream);
  if (error != cudaSuccess || p.running.num_batches_tracked == nullptr) return error;
  // In a second kernel, because every channel must have read the counter first.
  return launch(count_batch_kernel, p.running.num_batches_tracked, 1, 0, stream);
}

// All files are compiled for the same architectures: any kernel answers for all of them.
cudaError_t find_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, count_batch_kernel);
}

}  // namespace cuda
}  // namespace bnorm_ext
