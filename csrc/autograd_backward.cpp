// The backward operators are differentiable themselves: C++ autograd Functions on their Autograd
// key, whose derivatives (double_backward.cpp) are made of differentiable ATen operations.
#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
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

// What the Function needs beyond its differentiable inputs.
struct Call {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& mean;
  const OptionalTensor& rstd;
  bool train;
  double eps;
  const OptionalTensor& mask;
  std::string_view act;
  double negative_slope;
  std::array<bool, 4> output_mask;
  std::array<Tensor, 2> statistics;  // mean and rstd as BackwardInputs has them
};

// Outputs only the gradients that are wanted, in the operator's order.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x,
                               const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Call& call) {
    at::AutoDispatchBelowAutograd guard;
    auto [dx, dresidual, dweight, dbias] = backward_op().call(
        dy, x, residual_to_read(residual, call.mask), weight, bias, call.running_mean,
        call.running_var, call.mean, call.rstd, call.train, call.eps, call.mask, call.act,
        call.negative_slope, call.output_mask, /*any_layout=*/false);
    ctx->save_for_backward({dy, x, or_undefined(residual), or_undefined(weight), or_undefined(bias),
                            call.statistics[0], call.statistics[1], or_undefined(call.mask)});
    ctx->saved_data["train"] = call.train;
    ctx->saved_data["act"] = static_cast<int64_t>(activation_named(call.act));
    ctx->saved_data["slope"] = call.negative_slope;
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
    const auto act = static_cast<Activation>(ctx->saved_data["act"].toInt());
    const auto gradients = double_backward(
        dd, {saved[0], saved[1], optional(saved[2]), optional(saved[3]), optional(saved[4]),
             saved[5], saved[6], ctx->saved_data["train"].toBool(), optional(saved[7]), act,
             ctx->saved_data["slope"].toDouble()});
    WantedGradients wanted(ctx, ctx->saved_data["given"].toInt());
    // The derivative of a piecewise linear activation is a function with the derivative 0: torch's
    // own activations send zeros to all that z is made of, where others send nothing.
    const bool zeros = gradients[0].defined() && is_piecewise(act);
    variable_list out;
    for (size_t i = 0; i < gradients.size(); ++i) {
      const bool is_wanted = wanted.next();
      const bool is_zero = is_wanted && zeros && !gradients[i].defined();
      out.push_back(is_zero ? at::zeros_like(saved[i]) : is_wanted ? gradients[i] : Tensor());
    }
    out.emplace_back();  // of Call
    return out;
  }
};

std::array<Tensor, 2> mean_and_rstd(const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& mean,
                                    const OptionalTensor& rstd, bool train, double eps,
                                    at::ScalarType acc) {
  if (train) return {*mean, *rstd};
  return {running_mean->detach().to(acc).contiguous(),
          (running_var->detach().to(at::kDouble) + eps).rsqrt().to(acc)};
}

// Whether a transform of torch.func is active, for which a C++ Function raises an error.
bool is_transformed() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& mean, const OptionalTensor& rstd, bool train, double eps,
                   const OptionalTensor& mask, std::string_view act, double negative_slope,
                   std::array<bool, 4> output_mask, bool any_layout) {
  refuse_gradient("native_batch_norm_backward", running_mean, "running_mean");
  refuse_gradient("native_batch_norm_backward", running_var, "running_var");
  const bool complete =
      train ? given(mean) && given(rstd) : given(running_mean) && given(running_var);
  const bool is_recorded = at::GradMode::is_enabled() &&
                           (dy.requires_grad() || x.requires_grad() || requires_grad(residual) ||
                            requires_grad(weight) || requires_grad(bias));
  const bool is_dual = has_tangent(dy) || has_tangent(x) || has_tangent(residual) ||
                       has_tangent(weight) || has_tangent(bias);
  // C++ Functions know neither tangents nor functorch.
  if (complete && (is_dual || (is_recorded && is_transformed())) && x.sym_numel() != 0) {
    const auto statistics = mean_and_rstd(running_mean, running_var, mean, rstd, train, eps,
                                          accumulation_type(x.scalar_type()));
    auto [dx, dresidual, dweight, dbias] =
        differentiable_backward({dy, x, residual, weight, bias, statistics[0], statistics[1], train,
                                 mask, activation_named(act), negative_slope});
    const auto wanted = [&](int i, const Tensor& t) { return output_mask[i] ? t : Tensor(); };
    return {wanted(0, dx), wanted(1, dresidual), wanted(2, dweight), wanted(3, dbias)};
  }
  // The operator refuses a call whose statistics are missing.
  if (!complete || !is_recorded) {
    at::AutoDispatchBelowAutograd guard;
    return backward_op().call(dy, x, residual, weight, bias, running_mean, running_var, mean, rstd,
                              train, eps, mask, act, negative_slope, output_mask, any_layout);
  }
  const Call call{running_mean,
                  running_var,
                  mean,
                  rstd,
                  train,
                  eps,
                  mask,
                  act,
                  negative_slope,
                  output_mask,
                  mean_and_rstd(running_mean, running_var, mean, rstd, train, eps,
                                accumulation_type(x.scalar_type()))};
  const variable_list out = Backward::apply(dy, x, residual, flat(weight), flat(bias), call);
  size_t next = 0;
  const auto take = [&](int i) { return output_mask[i] ? out[next++] : Tensor(); };
  Tensor dx = take(0), dresidual = take(1), dweight = take(2), dbias = take(3);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Autograd, m) {
  m.impl("batch_norm_backward", backward);
}

}  // namespace bnorm_ext
