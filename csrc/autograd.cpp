// Derivatives: C++ autograd Functions on the Autograd key of the operators, version counters on the
// ADInplaceOrView key, and the double backward as plain differentiable ATen operations.
//
// Training saves x, weight, mean and rstd and nothing that a later forward pass changes: two
// forward passes before one backward are safe. Inference saves the running statistics, like native.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "checks.h"

namespace bnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using TrainingSignature = ForwardOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         std::optional<double>, double, std::string_view, double);
using InferenceSignature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                      const OptionalTensor&, const OptionalTensor&,
                                                      const Tensor&, const Tensor&, double,
                                                      std::string_view, double);
using BackwardSignature = Gradients(const Tensor&, const Tensor&, const OptionalTensor&,
                                    const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                    const Tensor&, const OptionalTensor&, std::string_view, double,
                                    std::array<bool, 4>);
using InferenceBackwardSignature = Gradients(const Tensor&, const Tensor&, const OptionalTensor&,
                                             const OptionalTensor&, const OptionalTensor&,
                                             const Tensor&, const Tensor&, double,
                                             const OptionalTensor&, std::string_view, double,
                                             std::array<bool, 4>);
using MergeSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                  const OptionalTensor&, const OptionalTensor&,
                                                  const OptionalTensor&, std::optional<double>,
                                                  double, at::ScalarType);
using DoubleBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
    const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, std::array<bool, 3>);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// One handle an operator, looked up at its first call.
const auto& training_op() {
  static const auto op = find<TrainingSignature>("bnorm_ext::batch_norm_training");
  return op;
}
const auto& inference_op() {
  static const auto op = find<InferenceSignature>("bnorm_ext::batch_norm_inference");
  return op;
}
const auto& backward_op() {
  static const auto op = find<BackwardSignature>("bnorm_ext::batch_norm_backward");
  return op;
}
const auto& inference_backward_op() {
  static const auto op =
      find<InferenceBackwardSignature>("bnorm_ext::batch_norm_inference_backward");
  return op;
}
const auto& double_backward_op() {
  static const auto op = find<DoubleBackwardSignature>("bnorm_ext::batch_norm_double_backward");
  return op;
}
const auto& merge_op() {
  static const auto op = find<MergeSignature>("bnorm_ext::batch_norm_merge_stats");
  return op;
}

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

bool requires_grad(const OptionalTensor& t) { return given(t) && t->requires_grad(); }

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

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
};

struct InferenceCall {
  const Tensor& running_mean;
  const Tensor& running_var;
  double eps;
  std::string_view act;
  double negative_slope;
};

struct Training : torch::autograd::Function<Training> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const TrainingCall& call) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, mean, rstd, mask] = training_op().call(
        x, residual, weight, bias, call.running_mean, call.running_var, call.num_batches_tracked,
        call.momentum, call.eps, call.act, call.negative_slope);
    ctx->save_for_backward({x, given(weight) ? *weight : Tensor(), mean, rstd});
    ctx->saved_data["given"] =
        given_bits({true, given(residual), given(weight), given(bias)});
    ctx->mark_non_differentiable({mean, rstd, mask});
    ctx->set_materialize_grads(false);
    return {y, mean, rstd, mask};
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

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const InferenceCall& call) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, mask] =
        inference_op().call(x, residual, weight, bias, call.running_mean, call.running_var,
                            call.eps, call.act, call.negative_slope);
    ctx->save_for_backward(
        {x, given(weight) ? *weight : Tensor(), call.running_mean, call.running_var});
    ctx->saved_data["given"] =
        given_bits({true, given(residual), given(weight), given(bias)});
    ctx->saved_data["eps"] = call.eps;
    ctx->mark_non_differentiable({mask});
    ctx->set_materialize_grads(false);
    return {y, mask};
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
  const bool differentiable =
      at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                     requires_grad(weight) || requires_grad(bias));
  if (!differentiable) {
    at::AutoDispatchBelowAutograd guard;
    return training_op().call(x, residual, weight, bias, running_mean, running_var,
                              num_batches_tracked, momentum, eps, act, negative_slope);
  }
  const TrainingCall call{running_mean, running_var, num_batches_tracked, momentum,
                          eps,          act,         negative_slope};
  variable_list out = Training::apply(x, residual, flat(weight), flat(bias), call);
  return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3])};
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double negative_slope) {
  const bool differentiable =
      at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(residual) ||
                                     requires_grad(weight) || requires_grad(bias));
  if (!differentiable) {
    at::AutoDispatchBelowAutograd guard;
    return inference_op().call(x, residual, weight, bias, running_mean, running_var, eps, act,
                               negative_slope);
  }
  const InferenceCall call{running_mean, running_var, eps, act, negative_slope};
  variable_list out = Inference::apply(x, residual, flat(weight), flat(bias), call);
  return {std::move(out[0]), std::move(out[1])};
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
    auto [ddy, dx, dweight] = double_backward_op().call(
        dd[0], dd[1], dd[2], saved[0], saved[1], optional(saved[2]), saved[3], saved[4],
        ctx->saved_data["training"].toBool(), mask);
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
      dy, x, weight,
      {running_mean.detach(), rstd, false, output_mask, run, &running_var, eps});
}

// With xhat = (x - mean) * rstd and P(v) = v - mean(v) - xhat * mean(v * xhat), means over all but
// the channels, batch_norm_backward computes
//   dx = weight * rstd * P(dy),   dweight = sum(dy * xhat),   dbias = sum(dy)
// and, because P is symmetric and d xhat = rstd * P(d x), the gradients of
//   <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>
// are those below. In inference the statistics are constants: P(v) = v and d xhat = rstd * d x.
// mean and rstd are made functions of x again, with the values they have, so that derivatives of
// any order are right.
std::tuple<Tensor, Tensor, Tensor> double_backward(
    const OptionalTensor& ddx, const OptionalTensor& ddweight, const OptionalTensor& ddbias,
    const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& weight, const Tensor& mean_in,
    const Tensor& rstd_in, bool training, std::array<bool, 3> output_mask) {
  if (!given(ddx) && !given(ddweight) && !given(ddbias)) return {};
  const at::ScalarType type = accumulation_type(x_in.scalar_type());
  std::vector<int64_t> dims = {0};
  for (int64_t d = 2; d < x_in.dim(); ++d) dims.push_back(d);
  std::vector<c10::SymInt> per_channel(static_cast<size_t>(x_in.dim()), 1);
  per_channel[1] = x_in.sym_size(1);
  const auto broadcast = [&](const Tensor& t) { return t.to(type).reshape_symint(per_channel); };
  const auto average = [&](const Tensor& t) { return t.mean(dims, /*keepdim=*/true); };

  const Tensor x = x_in.to(type), dy = dy_in.to(type);
  Tensor mean = broadcast(mean_in), rstd = broadcast(rstd_in);
  if (training) {
    const Tensor mean_of_x = average(x);
    mean = mean.detach() + (mean_of_x - mean_of_x.detach());
    const Tensor var_of_x = average((x - mean).square());
    rstd = (rstd.detach().pow(-2) + (var_of_x - var_of_x.detach())).rsqrt();
  }
  const Tensor xhat = (x - mean) * rstd;
  const auto project = [&](const Tensor& v) {
    return training ? v - average(v) - xhat * average(v * xhat) : v;
  };
  const Tensor scale = given(weight) ? broadcast(*weight) * rstd : rstd;
  const Tensor p_dy = project(dy);

  Tensor g_dy, g_x, g_weight;
  const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
  if (given(ddx)) {
    const Tensor a = ddx->to(type);
    if (output_mask[0]) add(g_dy, scale * project(a));
    if (output_mask[1] && training) {
      const Tensor terms = xhat * average(a * p_dy) + project(a) * average(dy * xhat) +
                           p_dy * average(a * xhat);
      add(g_x, -(scale * rstd) * terms);
    }
    if (output_mask[2]) g_weight = (a * rstd * p_dy).sum(dims);
  }
  if (given(ddweight)) {
    const Tensor b = broadcast(*ddweight);
    if (output_mask[0]) add(g_dy, b * xhat);
    if (output_mask[1]) add(g_x, b * rstd * p_dy);
  }
  if (given(ddbias) && output_mask[0]) add(g_dy, broadcast(*ddbias).expand_as(dy));
  if (g_dy.defined()) g_dy = g_dy.to(dy_in.scalar_type());
  if (g_x.defined()) g_x = g_x.to(x_in.scalar_type());
  if (g_weight.defined() && given(weight)) g_weight = g_weight.to(weight->scalar_type());
  return {g_dy, g_x, g_weight};
}

// ---- Version counters of the buffers that are changed in place ---------------------------------

void bump_versions(std::initializer_list<std::reference_wrapper<const OptionalTensor>> buffers) {
  for (const OptionalTensor& t : buffers) {
    if (given(t)) torch::autograd::increment_version(*t);
  }
}

ForwardOutputs training_in_place(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var,
                                 const OptionalTensor& num_batches_tracked,
                                 std::optional<double> momentum, double eps, std::string_view act,
                                 double negative_slope) {
  ForwardOutputs out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = training_op().call(x, residual, weight, bias, running_mean, running_var,
                             num_batches_tracked, momentum, eps, act, negative_slope);
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

TORCH_LIBRARY_IMPL(bnorm_ext, ADInplaceOrView, m) {
  m.impl("batch_norm_training", training_in_place);
  m.impl("batch_norm_merge_stats", merge_in_place);
}

TORCH_LIBRARY_IMPL(bnorm_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_double_backward", double_backward);
}

}  // namespace bnorm_ext
