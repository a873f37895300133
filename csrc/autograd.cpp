// Derivatives of the forward operators: C++ autograd Functions on their Autograd key. The backward
// operators are differentiable themselves (autograd_backward.cpp).
//
// Saved are x, weight and the statistics. In training these are the batch's, which no later forward
// pass changes, so that two forward passes before one backward are safe; in inference the running
// ones, as in native. With an activation, z is recomputed in backward, from bias too; after an
// addition from the mask, or from residual where act is not piecewise linear. Residual is the
// output of another layer, which mostly is kept anyway, while z would take memory of its own.
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

// What the Function needs beyond its differentiable inputs.
struct Call {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  bool train;
  std::optional<double> momentum;
  double eps;
  std::string_view act;
  double negative_slope;
  bool save_mask;
  // Outputs without a derivative bypass the Function: compiled autograd takes no Function that
  // marks some of its outputs as not differentiable. mean and rstd are those of training.
  Tensor mean = {}, rstd = {}, mask = {};

  // Returns y.
  Tensor run(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
             const OptionalTensor& bias) {
    Tensor y;
    if (train) {
      std::tie(y, mean, rstd, mask) =
          training_op().call(x, residual, weight, bias, running_mean, running_var,
                             num_batches_tracked, momentum, eps, act, negative_slope, save_mask);
    } else {
      std::tie(y, mask) = inference_op().call(x, residual, weight, bias, *running_mean,
                                              *running_var, eps, act, negative_slope, save_mask);
    }
    return y;
  }
};

// Keeps what the backward pass needs.
void save(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
          const OptionalTensor& weight, const OptionalTensor& bias, const Call& call) {
  ctx->saved_data["given"] = bits({true, given(residual), given(weight), given(bias), call.train});
  if (!call.train) ctx->saved_data["eps"] = call.eps;
  ctx->set_materialize_grads(false);
  const Tensor& mean = call.train ? call.mean : *call.running_mean;
  const Tensor& rstd_or_var = call.train ? call.rstd : *call.running_var;
  const Activation act = activation_named(call.act);
  if (act == Activation::Identity) {
    ctx->save_for_backward({x, or_undefined(weight), mean, rstd_or_var});
    return;
  }
  ctx->saved_data["act"] = static_cast<int64_t>(act);
  ctx->saved_data["slope"] = call.negative_slope;
  const bool has_mask = given(residual) && is_piecewise(act);
  ctx->save_for_backward(
      {x, or_undefined(weight), mean, rstd_or_var, has_mask ? Tensor() : or_undefined(bias),
       has_mask ? Tensor() : or_undefined(residual), has_mask ? call.mask : Tensor()});
}

// In the place of an input that the current node has not kept: zeros of its shape without storage
// of that size, connected to the same edge of the graph.
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

// What `save` kept, and which gradients are wanted.
struct Saved {
  explicit Saved(AutogradContext* ctx) : t(ctx->get_saved_variables()) {
    const int64_t given = ctx->saved_data["given"].toInt();
    WantedGradients wanted(ctx, given);
    output_mask = {wanted.next(), wanted.next(), wanted.next(), wanted.next()};
    train = (given >> 4) & 1;
    if (!train) eps = ctx->saved_data["eps"].toDouble();
    if (t.size() > 4) {
      act = static_cast<Activation>(ctx->saved_data["act"].toInt());
      slope = ctx->saved_data["slope"].toDouble();
      if (t[6].defined() && at::GradMode::is_enabled()) {
        // The second derivative with respect to what the mask replaced is 0, not absent.
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

  Gradients run_backward(const Tensor& dy) const {
    const OptionalTensor mean = t[2], rstd_or_var = t[3], none;
    const bool is_compiled = dy.key_set().has(c10::DispatchKey::Python);
    return backward_op().call(dy, t[0], saved(5), saved(1), saved(4), train ? none : mean,
                              train ? none : rstd_or_var, train ? mean : none,
                              train ? rstd_or_var : none, train, eps, saved(6),
                              activation_name(act), slope, output_mask,
                              // The compiler of a recorded backward pass chooses strides.
                              /*any_layout=*/is_compiled);
  }
  // In the order of the Function's inputs, the call last.
  variable_list gradients(const Tensor& dy) const {
    auto [dx, dresidual, dweight, dbias] = run_backward(dy);
    return {dx, residual_takes_dy ? dy : dresidual, dweight, dbias, Tensor()};
  }

 private:
  OptionalTensor saved(size_t i) const { return t.size() > i ? optional(t[i]) : std::nullopt; }

  // x, weight, mean, rstd or (inference) running_var; with an activation bias, residual, mask too.
  variable_list t;
  std::array<bool, 4> output_mask;
  bool train;
  double eps = 0;  // of inference
  Activation act = Activation::Identity;
  double slope = 0;
  bool residual_takes_dy = false;
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, Call* call) {
    at::AutoDispatchBelowAutograd guard;
    call->save_mask = true;
    const Tensor y = call->run(x, residual, weight, bias);
    save(ctx, x, residual, weight, bias, *call);
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    return Saved(ctx).gradients(grads[0]);
  }
};

// Returns y.
Tensor run(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
           const OptionalTensor& bias, Call* call) {
  refuse_gradient("native_batch_norm", call->running_mean, "running_mean");
  refuse_gradient("native_batch_norm", call->running_var, "running_var");
  // The operators themselves have no forward mode; bnorm_ext.batch_norm has.
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(residual) && !has_tangent(weight) && !has_tangent(bias),
      "Trying to use forward AD with ",
      call->train ? "batch_norm_training" : "batch_norm_inference",
      ", which has no derivative for it. Call bnorm_ext.batch_norm instead.");
  if (at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                     requires_grad(weight) || requires_grad(bias))) {
    return BatchNorm::apply(x, residual, flat(weight), flat(bias), call)[0];
  }
  at::AutoDispatchBelowAutograd guard;
  return call->run(x, residual, weight, bias);
}

ForwardOutputs training(const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                        double eps, std::string_view act, double negative_slope, bool save_mask) {
  Call call{running_mean, running_var, num_batches_tracked, /*train=*/true, momentum,
            eps,          act,         negative_slope,      save_mask};
  Tensor y = run(x, residual, weight, bias, &call);
  return {std::move(y), std::move(call.mean), std::move(call.rstd), std::move(call.mask)};
}

TensorPair inference(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& running_mean,
                     const Tensor& running_var, double eps, std::string_view act,
                     double negative_slope, bool save_mask) {
  Call call{running_mean, running_var, std::nullopt,   /*train=*/false, std::nullopt,
            eps,          act,         negative_slope, save_mask};
  Tensor y = run(x, residual, weight, bias, &call);
  return {std::move(y), std::move(call.mask)};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Autograd, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  // The autograd Function around these is in bnorm_ext/distributed/function.py.
  m.impl("batch_norm_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_merge_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_apply", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_reduce", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_backward_apply", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace bnorm_ext
