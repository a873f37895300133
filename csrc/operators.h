// The operators that C++ calls: their bodies, one for all devices (forward.cpp, backward.cpp), and
// the handles that call them through the dispatcher, with the signatures of the bodies. What they
// do, and the schemas, are in bindings.cpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "tensors.h"

namespace bnorm_ext {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using ForwardOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardOutputs batch_norm_training(const at::Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps, std::string_view act,
                                   double negative_slope, bool save_mask);
TensorPair batch_norm_inference(const at::Tensor& x, const OptionalTensor& residual,
                                const OptionalTensor& weight, const OptionalTensor& bias,
                                const at::Tensor& running_mean, const at::Tensor& running_var,
                                double eps, std::string_view act, double negative_slope,
                                bool save_mask);
Gradients batch_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                              const OptionalTensor& residual, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, const OptionalTensor& mean,
                              const OptionalTensor& rstd, bool train, double eps,
                              const OptionalTensor& mask, std::string_view act,
                              double negative_slope, std::array<bool, 4> output_mask,
                              bool any_layout);

// For statistics that are shared between processes.
TensorPair batch_norm_merge_stats(const at::Tensor& mean, const at::Tensor& var,
                                  const at::Tensor& count, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var,
                                  const OptionalTensor& num_batches_tracked,
                                  std::optional<double> momentum, double eps, at::ScalarType dtype);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// One handle an operator, looked up at its first call.
inline const auto& training_op() {
  static const auto op = find<decltype(batch_norm_training)>("bnorm_ext::batch_norm_training");
  return op;
}
inline const auto& inference_op() {
  static const auto op = find<decltype(batch_norm_inference)>("bnorm_ext::batch_norm_inference");
  return op;
}
inline const auto& backward_op() {
  static const auto op = find<decltype(batch_norm_backward)>("bnorm_ext::batch_norm_backward");
  return op;
}
inline const auto& merge_op() {
  static const auto op =
      find<decltype(batch_norm_merge_stats)>("bnorm_ext::batch_norm_merge_stats");
  return op;
}

}  // namespace bnorm_ext
