// Derivatives: C++ autograd Functions on the Autograd key of the operators. The backward operators
// are differentiable themselves.
//
// Training saves x, weight, mean and rstd and nothing that a later forward pass changes: two
// forward passes before one backward are safe. Inference saves the running statistics, like native.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "checks.h"
#include "double_backward.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool requires_grad(const OptionalTensor& t) {
  return given(t) && t->requires_grad();
}

OptionalTensor optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Native's words: buffers are not differentiable.
void refuse_gradient(const OptionalTensor& buffer, const char* name) {
  TORCH_CHECK(!requires_grad(buffer) || !at::GradMode::is_enabled(),
              "The function 'native_batch_norm' is not differentiable with respect to argument '",
              name, "'. This input cannot have requires_grad True.");
}

// Weight and bias of other than one dimension, as native takes them.
OptionalTensor flat(const OptionalTensor& t) {
  return given(t) && t->dim() != 1 ? t->reshape({-1}) : t;
}

// Autograd numbers the edges of a node by the tensors that were really given. Steps through the
// inputs of one Function in their order and tells which gradients are wanted.
class WantedGradients {
 public:
  WantedGradients(const AutogradContext* ctx, int64_t given) : ctx_(ctx), given_(given) {}
  bool next() {
    const bool present = (given_ >> position_++) & 1;
    return present && ctx_->needs_input_grad(edge_++);
  }

 private:
  const AutogradContext* ctx_;
  int64_t given_;
  int position_ = 0;
  size_t edge_ = 0;
};

int64_t given_bits(std::initializer_list<bool> given) {
  int64_t bits = 0, place = 0;
  for (const bool is_given : given) bits |= static_cast<int64_t>(is_given) << place++;
  return bits;
}

// ---- Forward ----------------------------------------------------------------------------------

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

struct Training : torch::autograd::Function<Training> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, TrainingCall* call) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, mean, rstd, mask] = training_op().call(
        x, residual, weight, bias, call->running_mean, call->running_var, call->num_batches_tracked,
        call->momentum, call->eps, call->act, call->negative_slope);
    ctx->save_for_backward({x, given(weight) ? *weight : Tensor(), mean, rstd});
    ctx->saved_data["given"] = given_bits({true, given(residual), given(weight), given(bias)});
    ctx->set_materialize_grads(false);
    call->mean = mean;
    call->rstd = rstd;
    call->mask = mask;
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const variable_list saved = ctx->get_saved_variables();
    WantedGradients wanted(ctx, ctx->saved_data["given"].toInt());
    const std::array<bool, 4> mask = {wanted.next(), wanted.next(), wanted.next(), wanted.next()};
    auto [dx, dresidual, dweight, dbias] =
        backward_op().call(grads[0], saved[0], std::nullopt, optional(saved[1]), std::nullopt,
                           saved[2], saved[3], std::nullopt, "identity", 0.0, mask);
    return {dx, dresidual, dweight, dbias, Tensor()};
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
                            call->eps, call->act, call->negative_slope);
    ctx->save_for_backward(
        {x, given(weight) ? *weight : Tensor(), call->running_mean, call->running_var});
    ctx->saved_data["given"] = given_bits({true, given(residual), given(weight), given(bias)});
    ctx->saved_data["eps"] = call->eps;
    ctx->set_materialize_grads(false);
    call->mask = mask;
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const variable_list saved = ctx->get_saved_variables();
    WantedGradients wanted(ctx, ctx->saved_data["given"].toInt());
    const std::array<bool, 4> mask = {wanted.next(), wanted.next(), wanted.next(), wanted.next()};
    auto [dx, dresidual, dweight, dbias] = inference_backward_op().call(
        grads[0], saved[0], std::nullopt, optional(saved[1]), std::nullopt, saved[2], saved[3],
        ctx->saved_data["eps"].toDouble(), std::nullopt, "identity", 0.0, mask);
    return {dx, dresidual, dweight, dbias, Tensor()};
  }
};

ForwardOutputs training(const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                        double eps, std::string_view act, double negative_slope) {
  refuse_gradient(running_mean, "running_mean");
  refuse_gradient(running_var, "running_var");
  const bool differentiable =
      at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                     requires_grad(weight) || requires_grad(bias));
  if (!differentiable) {
    at::AutoDispatchBelowAutograd guard;
    return training_op().call(x, residual, weight, bias, running_mean, running_var,
                              num_batches_tracked, momentum, eps, act, negative_slope);
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
                                     double eps, std::string_view act, double negative_slope) {
  refuse_gradient(running_mean, "running_mean");
  refuse_gradient(running_var, "running_var");
  const bool differentiable =
      at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                     requires_grad(weight) || requires_grad(bias));
  if (!differentiable) {
    at::AutoDispatchBelowAutograd guard;
    return inference_op().call(x, residual, weight, bias, running_mean, running_var, eps, act,
                               negative_slope);
  }
  InferenceCall call{running_mean, running_var, eps, act, negative_slope, {}};
  variable_list out = Inference::apply(x, residual, flat(weight), flat(bias), &call);
  return {std::move(out[0]), std::move(call.mask)};
}

// ---- Backward, itself differentiable ----------------------------------------------------------

struct BackwardCall {
  const Tensor& mean;  // of the batch, or the running one
  const Tensor& rstd;
  bool training;
  std::array<bool, 4> output_mask;
  Gradients (*run)(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                   const BackwardCall& call);
  const Tensor* running_var = nullptr;
  double eps = 0;
};

// Outputs only the gradients that are wanted, in the order dx, dweight, dbias.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x,
                               const OptionalTensor& weight, const BackwardCall& call) {
    at::AutoDispatchBelowAutograd guard;
    auto [dx, dresidual, dweight, dbias] = call.run(dy, x, weight, call);
    ctx->save_for_backward({dy, x, given(weight) ? *weight : Tensor(), call.mean, call.rstd});
    ctx->saved_data["training"] = call.training;
    ctx->saved_data["given"] = given_bits({true, true, given(weight)});
    ctx->saved_data["outputs"] =
        given_bits({call.output_mask[0], call.output_mask[2], call.output_mask[3]});
    ctx->set_materialize_grads(false);
    variable_list out;
    for (const Tensor& t : {dx, dweight, dbias}) {
      if (t.defined()) out.push_back(t);
    }
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t outputs = ctx->saved_data["outputs"].toInt();
    size_t next = 0;
    std::array<OptionalTensor, 3> dd;  // of dx, dweight, dbias
    for (int i = 0; i < 3; ++i) {
      if ((outputs >> i) & 1) dd[i] = optional(grads[next++]);
    }
    WantedGradients wanted(ctx, ctx->saved_data["given"].toInt());
    const std::array<bool, 3> mask = {wanted.next(), wanted.next(), wanted.next()};
    auto [ddy, dx, dweight] =
        double_backward(dd[0], dd[1], dd[2], saved[0], saved[1], optional(saved[2]), saved[3],
                        saved[4], ctx->saved_data["training"].toBool(), mask);
    return {ddy, dx, dweight, Tensor()};
  }
};

Gradients differentiable_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                  const BackwardCall& call) {
  const variable_list out = Backward::apply(dy, x, flat(weight), call);
  size_t next = 0;
  const auto take = [&](int i) { return call.output_mask[i] ? out[next++] : Tensor(); };
  Tensor dx = take(0), dweight = take(2), dbias = take(3);
  return {dx, Tensor(), dweight, dbias};
}

bool needs_double_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight) {
  return at::GradMode::is_enabled() &&
         (dy.requires_grad() || x.requires_grad() || requires_grad(weight));
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor& mask, std::string_view act,
                   double negative_slope, std::array<bool, 4> output_mask) {
  if (!needs_double_backward(dy, x, weight)) {
    at::AutoDispatchBelowAutograd guard;
    return backward_op().call(dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope,
                              output_mask);
  }
  check_activation(act, residual);
  const auto run = [](const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                      const BackwardCall& call) {
    return backward_op().call(dy, x, std::nullopt, weight, std::nullopt, call.mean, call.rstd,
                              std::nullopt, "identity", 0.0, call.output_mask);
  };
  return differentiable_backward(dy, x, weight, {mean, rstd, true, output_mask, run});
}

Gradients inference_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps,
                             const OptionalTensor& mask, std::string_view act,
                             double negative_slope, std::array<bool, 4> output_mask) {
  if (!needs_double_backward(dy, x, weight)) {
    at::AutoDispatchBelowAutograd guard;
    return inference_backward_op().call(dy, x, residual, weight, bias, running_mean, running_var,
                                        eps, mask, act, negative_slope, output_mask);
  }
  check_activation(act, residual);
  const auto run = [](const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                      const BackwardCall& call) {
    return inference_backward_op().call(dy, x, std::nullopt, weight, std::nullopt, call.mean,
                                        *call.running_var, call.eps, std::nullopt, "identity", 0.0,
                                        call.output_mask);
  };
  const at::ScalarType type = accumulation_type(x.scalar_type());
  const Tensor rstd = (running_var.detach().to(at::kDouble) + eps).rsqrt().to(type);
  return differentiable_backward(
      dy, x, weight, {running_mean.detach(), rstd, false, output_mask, run, &running_var, eps});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Autograd, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
  // Whoever shares statistics between processes writes the Function around these.
  m.impl("batch_norm_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_merge_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_apply", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_reduce", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_apply", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace bnorm_ext
