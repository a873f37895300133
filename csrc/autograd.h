// What the autograd Functions of both directions share.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>

#include "epilogue.h"

namespace bnorm_ext {

inline bool requires_grad(const OptionalTensor& t) {
  return given(t) && t->requires_grad();
}

// Whether it carries a tangent of forward-mode differentiation. torch has one level of them.
inline bool has_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const OptionalTensor& t) {
  return t.has_value() && has_tangent(*t);
}

// Native's words: buffers are not differentiable. function: native's name of it.
inline void refuse_gradient(const char* function, const OptionalTensor& buffer, const char* name) {
  TORCH_CHECK(!requires_grad(buffer) || !at::GradMode::is_enabled(), "The function '", function,
              "' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

inline OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor or_undefined(const OptionalTensor& t) {
  return given(t) ? *t : at::Tensor();
}

// Weight and bias of other than one dimension, as native takes them.
inline OptionalTensor flat(const OptionalTensor& t) {
  return given(t) && t->dim() != 1 ? t->reshape({-1}) : t;
}

inline int64_t bits(std::initializer_list<bool> values) {
  int64_t bits = 0, place = 0;
  for (const bool value : values) bits |= static_cast<int64_t>(value) << place++;
  return bits;
}

// Autograd numbers the edges of a node by the tensors that were really given. Steps through the
// inputs of one Function in their order and tells which gradients are wanted.
class WantedGradients {
 public:
  WantedGradients(const torch::autograd::AutogradContext* ctx, int64_t given)
      : ctx_(ctx), given_(given) {}
  bool next() {
    const bool present = (given_ >> position_++) & 1;
    return present && ctx_->needs_input_grad(edge_++);
  }

 private:
  const torch::autograd::AutogradContext* ctx_;
  int64_t given_;
  int position_ = 0;
  size_t edge_ = 0;
};

}  // namespace bnorm_ext
