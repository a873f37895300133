// Derivatives of the forward operators: C++ autograd Functions on their Autograd key. The backward
// operators are differentiable themselves (autograd_backward.cpp).
//
// Saved is x, weight, and the statistics: in training those of the batch, so that nothing that a
// later forward pass changes is needed and two forward passes before one backward are safe; in
// inference the running ones, like native. An activation adds what z is known by: bias, from which
// it is recomputed; after an addition also the mask, or residual where act is not piecewise linear
// (it is the output of another layer, which mostly keeps it as its own or its successor's input,
// while z would be a tensor of its own).
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "autograd.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Native's words: buffers are not differentiable.
void refuse_gradient(const OptionalTensor& buffer, const char* name) {
  TORCH_CHECK(!requires_grad(buffer) || !at::GradMode::is_enabled(),
              "The function 'native_batch_norm' is not differentiable with respect to argument '",
              name, "'. This input cannot have requires_grad True.");
}

// What the Functions need beyond their differentiable inputs.
struct TrainingCall {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  std::string_view act;
  double negative_slope;
  // Outputs without a derivative go round the Function: compiled autograd takes no Function that
  // marks some of its outputs.
  Tensor mean, rstd, mask;
};

struct InferenceCall {
  const Tensor& running_mean;
  const Tensor& running_var;
  double eps;
  std::string_view act;
  double negative_slope;
  Tensor mask;
};

// Keeps what both backward passes need.
void save(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
          const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
          const Tensor& rstd_or_var, const Tensor& mask, std::string_view act_name,
          double negative_slope) {
  ctx->saved_data["given"] = bits({true, given(residual), given(weight), given(bias)});
  ctx->set_materialize_grads(false);
  const Activation act = activation_named(act_name);
  if (act == Activation::Identity) {
    ctx->save_for_backward({x, or_undefined(weight), mean, rstd_or_var});
    return;
  }
  ctx->saved_data["act"] = static_cast<int64_t>(act);
  ctx->saved_data["slope"] = negative_slope;
  const bool has_mask = given(residual) && is_piecewise(act);
  ctx->save_for_backward(
      {x, or_undefined(weight), mean, rstd_or_var, has_mask ? Tensor() : or_undefined(bias),
       has_mask ? Tensor() : or_undefined(residual), has_mask ? mask : Tensor()});
}

// In the place of an input that was not kept by the node at work: zeros of its shape without its
// storage, that depend on what it depended on.
Tensor stand_in(size_t edge_number) {
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr) return {};
  const torch::autograd::Edge& edge = node->next_edge(edge_number);
  if (!edge.is_valid()) return {};
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  Tensor t = at::zeros({}, metadata.options()).expand_symint(metadata.shape_as_dim_vector());
  torch::autograd::impl::set_gradient_edge(t, edge);
  return t;
}

// And gives it back, with which gradients are wanted.
struct Saved {
  explicit Saved(AutogradContext* ctx) : t(ctx->get_saved_variables()) {
    const int64_t given = ctx->saved_data["given"].toInt();
    WantedGradients wanted(ctx, given);
    output_mask = {wanted.next(), wanted.next(), wanted.next(), wanted.next()};
    if (t.size() > 4) {
      act = static_cast<Activation>(ctx->saved_data["act"].toInt());
      slope = ctx->saved_data["slope"].toDouble();
      if (t[6].defined() && at::GradMode::is_enabled()) {
        // What the mask replaced takes part in the second derivative, with zeros.
        const bool has_weight = (given >> 2) & 1, has_bias = (given >> 3) & 1;
        t[5] = stand_in(1);
        if (has_bias) t[4] = stand_in(has_weight ? 3 : 2);
      }
    } else if (output_mask[1]) {
      // The gradient of an addition is that of the sum.
      output_mask[1] = false;
      residual_takes_dy = true;
    }
  }
  const Tensor& x() const { return t[0]; }
  OptionalTensor weight() const { return optional(t[1]); }
  const Tensor& mean() const { return t[2]; }
  const Tensor& rstd_or_var() const { return t[3]; }
  OptionalTensor bias() const { return extra(4); }
  OptionalTensor residual() const { return extra(5); }
  OptionalTensor mask() const { return extra(6); }
  // In the order of the Function's inputs, the call last.
  variable_list gradients(const Tensor& dy, Gradients g) const {
    auto& [dx, dresidual, dweight, dbias] = g;
    return {dx, residual_takes_dy ? dy : dresidual, dweight, dbias, Tensor()};
  }

  variable_list t;
  std::array<bool, 4> output_mask;
  Activation act = Activation::Identity;
  double slope = 0;
  bool residual_takes_dy = false;

 private:
  OptionalTensor extra(size_t i) const { return t.size() > i ? optional(t[i]) : std::nullopt; }
};

// Whether the backward pass is recorded rather than run: the compiler of the graph chooses strides.
bool is_compiled(const Tensor& dy) {
  return dy.key_set().has(c10::DispatchKey::Python);
}

struct Training : torch::autograd::Function<Training> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, TrainingCall* call) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, mean, rstd, mask] = training_op().call(
        x, residual, weight, bias, call->running_mean, call->running_var, call->num_batches_tracked,
        call->momentum, call->eps, call->act, call->negative_slope, /*save_mask=*/true);
    save(ctx, x, residual, weight, bias, mean, rstd, mask, call->act, call->negative_slope);
    call->mean = mean;
    call->rstd = rstd;
    call->mask = mask;
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const Saved s(ctx);
    return s.gradients(
        grads[0], backward_op().call(grads[0], s.x(), s.residual(), s.weight(), s.bias(), s.mean(),
                                     s.rstd_or_var(), s.mask(), activation_name(s.act), s.slope,
                                     s.output_mask, is_compiled(grads[0])));
  }
};

struct Inference : torch::autograd::Function<Inference> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, InferenceCall* call) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, mask] =
        inference_op().call(x, residual, weight, bias, call->running_mean, call->running_var,
                            call->eps, call->act, call->negative_slope, /*save_mask=*/true);
    save(ctx, x, residual, weight, bias, call->running_mean, call->running_var, mask, call->act,
         call->negative_slope);
    ctx->saved_data["eps"] = call->eps;
    call->mask = mask;
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const Saved s(ctx);
    return s.gradients(grads[0],
                       inference_backward_op().call(
                           grads[0], s.x(), s.residual(), s.weight(), s.bias(), s.mean(),
                           s.rstd_or_var(), ctx->saved_data["eps"].toDouble(), s.mask(),
                           activation_name(s.act), s.slope, s.output_mask, is_compiled(grads[0])));
  }
};

bool is_differentiable(const Tensor& x, const OptionalTensor& residual,
                       const OptionalTensor& weight, const OptionalTensor& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                        requires_grad(weight) || requires_grad(bias));
}

ForwardOutputs training(const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                        double eps, std::string_view act, double negative_slope, bool save_mask) {
  refuse_gradient(running_mean, "running_mean");
  refuse_gradient(running_var, "running_var");
  if (!is_differentiable(x, residual, weight, bias)) {
    at::AutoDispatchBelowAutograd guard;
    return training_op().call(x, residual, weight, bias, running_mean, running_var,
                              num_batches_tracked, momentum, eps, act, negative_slope, save_mask);
  }
  TrainingCall call{running_mean, running_var, num_batches_tracked, momentum,
                    eps,          act,         negative_slope,      {},
                    {},           {}};
  variable_list out = Training::apply(x, residual, flat(weight), flat(bias), &call);
  return {std::move(out[0]), std::move(call.mean), std::move(call.rstd), std::move(call.mask)};
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double negative_slope,
                                     bool save_mask) {
  refuse_gradient(running_mean, "running_mean");
  refuse_gradient(running_var, "running_var");
  if (!is_differentiable(x, residual, weight, bias)) {
    at::AutoDispatchBelowAutograd guard;
    return inference_op().call(x, residual, weight, bias, running_mean, running_var, eps, act,
                               negative_slope, save_mask);
  }
  InferenceCall call{running_mean, running_var, eps, act, negative_slope, {}};
  variable_list out = Inference::apply(x, residual, flat(weight), flat(bias), &call);
  return {std::move(out[0]), std::move(call.mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Autograd, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  // Whoever shares statistics between processes writes the Function around these.
  m.impl("batch_norm_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_merge_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_apply", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_reduce", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_apply", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace bnorm_ext
