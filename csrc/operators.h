// The operators as C++ calls them through the dispatcher: signatures and handles.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "checks.h"

namespace bnorm_ext {

using ForwardOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using TrainingSignature = ForwardOutputs(const at::Tensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, std::optional<double>, double,
                                         std::string_view, double, bool);
using InferenceSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const at::Tensor&, const at::Tensor&, double, std::string_view, double, bool);
using BackwardSignature = Gradients(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                    const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                                    const at::Tensor&, const OptionalTensor&, std::string_view,
                                    double, std::array<bool, 4>, bool);
using InferenceBackwardSignature = Gradients(const at::Tensor&, const at::Tensor&,
                                             const OptionalTensor&, const OptionalTensor&,
                                             const OptionalTensor&, const at::Tensor&,
                                             const at::Tensor&, double, const OptionalTensor&,
                                             std::string_view, double, std::array<bool, 4>, bool);
using MergeSignature = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, at::ScalarType);
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// One handle an operator, looked up at its first call.
inline const auto& training_op() {
  static const auto op = find<TrainingSignature>("bnorm_ext::batch_norm_training");
  return op;
}
inline const auto& inference_op() {
  static const auto op = find<InferenceSignature>("bnorm_ext::batch_norm_inference");
  return op;
}
inline const auto& backward_op() {
  static const auto op = find<BackwardSignature>("bnorm_ext::batch_norm_backward");
  return op;
}
inline const auto& inference_backward_op() {
  static const auto op =
      find<InferenceBackwardSignature>("bnorm_ext::batch_norm_inference_backward");
  return op;
}
inline const auto& merge_op() {
  static const auto op = find<MergeSignature>("bnorm_ext::batch_norm_merge_stats");
  return op;
}

}  // namespace bnorm_ext
