// The counters that elect the last block of a reducing kernel, and those of the teams' barriers.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace bnorm_ext {
namespace cuda {

// Semaphores are zero between launches; phases keep what the last barrier left.
enum class SemaphoreUse { Semaphores, Phases };

// At least `count` int32 words, for the next launch on the current stream of the current device,
// which is that of `options`. Semaphores are zero, and kernels reset them to zero, so that the same
// memory serves all launches of a stream, one after the other. Phases have any value. Under graph
// capture the memory is new and the graph itself fills it with zeros: replays share nothing with
// other graphs or streams.
at::Tensor semaphores(int64_t count, const at::TensorOptions& options,
                      SemaphoreUse use = SemaphoreUse::Semaphores);

}  // namespace cuda
}  // namespace bnorm_ext
