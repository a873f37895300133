// The counters that elect the last block of a reducing kernel, and those of a team's barriers.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace bnorm_ext {
namespace cuda {

// Semaphores are zero between launches, phases whatever the last barrier has left.
enum class SemaphoreUse { Semaphores, Phases };

// At least `count` int32 zeros (phases: words that nobody else uses) on the current device,
// which is that of `options`, for the next launch on its current stream. Kernels leave zeros
// behind, so the same memory serves all launches of a stream, one after the other. Under graph
// capture it is fresh memory that the graph itself fills with zeros: replays of several graphs, or
// beside other streams, share nothing.
at::Tensor semaphores(int64_t count, const at::TensorOptions& options,
                      SemaphoreUse use = SemaphoreUse::Semaphores);

}  // namespace cuda
}  // namespace bnorm_ext
