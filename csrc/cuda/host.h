// What the host code of both directions shares: the current stream and device, plans, memory for
// the launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../epilogue.h"
#include "device.h"
#include "kernels.h"
#include "semaphores.h"

namespace bnorm_ext {
namespace cuda {

using at::Tensor;

inline cudaStream_t stream() {
  return c10::cuda::getCurrentCUDAStream();
}

// Throws torch's error for what a launch has returned, and says which kernel's it is.
inline void check_launch(cudaError_t error, const char* kernel) {
  try {
    C10_CUDA_CHECK(error);
  } catch (c10::Error& e) {
    e.add_context(c10::str("bnorm_ext could not launch the kernel '", kernel, "'"));
    throw;
  }
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
    semaphores_ = SemaphoreMemory(semaphores_of(plan), in.tensor.options());
    staging_.partials = static_cast<Pair*>(partials_.data_ptr());
    staging_.semaphores = semaphores_.words();
  }
  const Staging& operator*() const { return staging_; }

 private:
  Tensor partials_;
  SemaphoreMemory semaphores_;
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
  const TilePlan plan = plan_two_pass(in.shape, element_bytes(in), is_aligned, limits());
  TORCH_CHECK(in.shape.N == 1 || plan.row_length <= kLongestRow || plan.row_length == INT64_MAX,
              "batch_norm: ", in.shape.S, " positions of a channel in ", in.shape.N,
              " samples are more than the CUDA kernels count");
  return plan;
}

}  // namespace cuda
}  // namespace bnorm_ext
