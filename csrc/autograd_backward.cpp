// The backward operators are differentiable themselves: C++ autograd Functions on their Autograd
// key, whose derivatives (double_backward.cpp) are made of differentiable ATen operations.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "autograd.h"
#include "double_backward.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BackwardCall {
  const BackwardInputs& in;
  std::array<bool, 4> output_mask;
  // Inference: what the operator is given in place of mean and rstd. Null in training.
  const Tensor* running_mean = nullptr;
  const Tensor* running_var = nullptr;
  double eps = 0;

  Gradients run(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                const OptionalTensor& bias) const {
    const char* act = activation_name(in.act);
    const OptionalTensor r = in.residual_to_read();
    if (running_var == nullptr) {
      return backward_op().call(dy, x, r, weight, bias, in.mean, in.rstd, in.mask, act, in.slope,
                                output_mask, /*any_layout=*/false);
    }
    return inference_backward_op().call(dy, x, r, weight, bias, *running_mean, *running_var, eps,
                                        in.mask, act, in.slope, output_mask, /*any_layout=*/false);
  }
};

// Outputs only the gradients that are wanted, in the operator's order.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const BackwardCall& call) {
    at::AutoDispatchBelowAutograd guard;
    auto [dx, dresidual, dweight, dbias] = call.run(dy, x, weight, bias);
    ctx->save_for_backward({dy, x, or_undefined(residual), or_undefined(weight), or_undefined(bias),
                            call.in.mean, call.in.rstd, or_undefined(call.in.mask)});
    ctx->saved_data["training"] = call.in.training;
    ctx->saved_data["act"] = static_cast<int64_t>(call.in.act);
    ctx->saved_data["slope"] = call.in.slope;
    ctx->saved_data["given"] = bits({true, true, given(residual), given(weight), given(bias)});
    ctx->saved_data["outputs"] =
        bits({call.output_mask[0], call.output_mask[1], call.output_mask[2], call.output_mask[3]});
    ctx->set_materialize_grads(false);
    variable_list out;
    for (const Tensor& t : {dx, dresidual, dweight, dbias}) {
      if (t.defined()) out.push_back(t);
    }
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t outputs = ctx->saved_data["outputs"].toInt();
    size_t next = 0;
    const auto take = [&](int i) {
      return (outputs >> i) & 1 ? optional(grads[next++]) : std::nullopt;
    };
    BackwardCotangents dd;
    dd.dx = take(0);
    dd.dresidual = take(1);
    dd.dweight = take(2);
    dd.dbias = take(3);
    const auto gradients = double_backward(
        dd,
        {saved[0], saved[1], optional(saved[2]), optional(saved[3]), optional(saved[4]), saved[5],
         saved[6], optional(saved[7]), static_cast<Activation>(ctx->saved_data["act"].toInt()),
         ctx->saved_data["slope"].toDouble(), ctx->saved_data["training"].toBool()});
    WantedGradients wanted(ctx, ctx->saved_data["given"].toInt());
    // The derivative of a piecewise linear activation is a function with the derivative 0: torch's
    // own activations send zeros to all that z is made of, where others send nothing.
    const bool zeros = gradients[0].defined() &&
                       is_piecewise(static_cast<Activation>(ctx->saved_data["act"].toInt()));
    variable_list out;
    for (size_t i = 0; i < gradients.size(); ++i) {
      const bool is_wanted = wanted.next();
      const bool is_zero = is_wanted && zeros && !gradients[i].defined();
      out.push_back(is_zero ? at::zeros_like(saved[i]) : is_wanted ? gradients[i] : Tensor());
    }
    out.emplace_back();  // of BackwardCall
    return out;
  }
};

Gradients differentiable(const BackwardCall& call) {
  const BackwardInputs& in = call.in;
  const variable_list out =
      Backward::apply(in.dy, in.x, in.residual, flat(in.weight), flat(in.bias), call);
  size_t next = 0;
  const auto take = [&](int i) { return call.output_mask[i] ? out[next++] : Tensor(); };
  Tensor dx = take(0), dresidual = take(1), dweight = take(2), dbias = take(3);
  return {dx, dresidual, dweight, dbias};
}

bool needs_double_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                           const OptionalTensor& weight, const OptionalTensor& bias) {
  return at::GradMode::is_enabled() &&
         (dy.requires_grad() || x.requires_grad() || requires_grad(residual) ||
          requires_grad(weight) || requires_grad(bias));
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor& mask, std::string_view act,
                   double negative_slope, std::array<bool, 4> output_mask, bool any_layout) {
  if (!needs_double_backward(dy, x, residual, weight, bias)) {
    at::AutoDispatchBelowAutograd guard;
    return backward_op().call(dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope,
                              output_mask, any_layout);
  }
  const BackwardInputs in{dy,
                          x,
                          residual,
                          weight,
                          bias,
                          mean,
                          rstd,
                          mask,
                          activation_named(act),
                          negative_slope,
                          /*training=*/true};
  return differentiable({in, output_mask});
}

Gradients inference_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps,
                             const OptionalTensor& mask, std::string_view act,
                             double negative_slope, std::array<bool, 4> output_mask,
                             bool any_layout) {
  if (!needs_double_backward(dy, x, residual, weight, bias)) {
    at::AutoDispatchBelowAutograd guard;
    return inference_backward_op().call(dy, x, residual, weight, bias, running_mean, running_var,
                                        eps, mask, act, negative_slope, output_mask, any_layout);
  }
  const at::ScalarType type = accumulation_type(x.scalar_type());
  const Tensor mean = running_mean.detach().to(type).contiguous();
  const Tensor rstd = (running_var.detach().to(at::kDouble) + eps).rsqrt().to(type);
  const BackwardInputs in{dy,
                          x,
                          residual,
                          weight,
                          bias,
                          mean,
                          rstd,
                          mask,
                          activation_named(act),
                          negative_slope,
                          /*training=*/false};
  return differentiable({in, output_mask, &running_mean, &running_var, eps});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Autograd, m) {
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
}

}  // namespace bnorm_ext
