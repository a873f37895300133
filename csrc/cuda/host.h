// What the host code of both directions shares: the current stream and device, plans, memory for
// the launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "../epilogue.h"
#include "kernels.h"
#include "semaphores.h"

namespace bnorm_ext {
namespace cuda {

using at::Tensor;

inline cudaStream_t stream() {
  return c10::cuda::getCurrentCUDAStream();
}

// Of the current device. The driver answers from its cache.
inline DeviceLimits limits() {
  const int device = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.max_cluster = attribute(cudaDevAttrClusterLaunch) != 0 ? kLargestCluster : 1;
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  return limits;
}

template <typename... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Memory that the blocks of one launch of a reducing kernel exchange values through.
class StagingMemory {
 public:
  StagingMemory(const TilePlan& plan, const Input& in) {
    if (plan.chunks == 1) return;
    const int64_t bytes = partials_of(plan) * static_cast<int64_t>(sizeof(Pair));
    partials_ = at::empty({bytes}, in.tensor.options().dtype(at::kByte));
    semaphores_ = semaphores(plan.tiles, in.tensor.options());
    staging_ = {static_cast<Pair*>(partials_.data_ptr()),
                reinterpret_cast<unsigned*>(semaphores_.data_ptr<int32_t>())};
  }
  const Staging& operator*() const { return staging_; }

 private:
  Tensor partials_, semaphores_;
  Staging staging_;
};

inline int element_bytes(const Input& in) {
  return static_cast<int>(in.tensor.element_size());
}

inline bool is_grouped(const Input& in) {
  return channels_of_group(in.shape, element_bytes(in)) != 0;
}

// Kernels that take groups of channels access their tensors by whole vectors only: a copy of t
// where it is not aligned for that.
inline Tensor aligned_if_grouped(const Tensor& t, const Input& like) {
  return t.defined() && is_grouped(like) && !aligned(t.const_data_ptr()) ? t.clone() : t;
}

// Of an undefined tensor null, which is aligned.
inline const void* data_of(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

// A mask is read in the residual's place.
inline EpilogueParams epilogue_params(const Epilogue& e) {
  return {e.act, e.slope, e.reads_mask() ? nullptr : data_of(e.residual)};
}

inline TilePlan plan_for(const Input& in, bool is_aligned) {
  return plan_two_pass(in.shape, element_bytes(in), is_aligned, limits());
}

}  // namespace cuda
}  // namespace bnorm_ext
