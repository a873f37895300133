// Version counters of the buffers that are changed in place, on the ADInplaceOrView key: an
// operator written in C++ does not move them by itself, and autograd would miss the change.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <functional>
#include <tuple>

#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;

void bump_versions(std::initializer_list<std::reference_wrapper<const OptionalTensor>> buffers) {
  for (const OptionalTensor& t : buffers) {
    // Inference tensors have no version; native changes them all the same.
    if (given(t) && !t->is_inference()) torch::autograd::increment_version(*t);
  }
}

ForwardOutputs training_in_place(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var,
                                 const OptionalTensor& num_batches_tracked,
                                 std::optional<double> momentum, double eps, std::string_view act,
                                 double negative_slope, bool save_mask) {
  // Native's addition refuses such a counter, in these words.
  if (given(num_batches_tracked) && num_batches_tracked->is_inference()) {
    torch::autograd::increment_version(*num_batches_tracked);
  }
  ForwardOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = training_op().call(x, residual, weight, bias, running_mean, running_var,
                             num_batches_tracked, momentum, eps, act, negative_slope, save_mask);
  }
  bump_versions({running_mean, running_var, num_batches_tracked});
  return out;
}

std::tuple<Tensor, Tensor> merge_in_place(const Tensor& mean, const Tensor& var,
                                          const Tensor& count, const OptionalTensor& running_mean,
                                          const OptionalTensor& running_var,
                                          const OptionalTensor& num_batches_tracked,
                                          std::optional<double> momentum, double eps,
                                          at::ScalarType dtype) {
  std::tuple<Tensor, Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = merge_op().call(mean, var, count, running_mean, running_var, num_batches_tracked,
                          momentum, eps, dtype);
  }
  bump_versions({running_mean, running_var, num_batches_tracked});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, ADInplaceOrView, m) {
  m.impl("batch_norm_training", training_in_place);
  m.impl("batch_norm_merge_stats", merge_in_place);
}

}  // namespace bnorm_ext
