// The backward operators on every device: checks, the view of the tensors as [N, C, S], allocation;
// then the device's kernels (backend.h).
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;

// All but the statistics.
BackwardCall backward_call(const GradientArguments& a, const OptionalTensor& residual,
                           const OptionalTensor& mask, std::string_view act,
                           double negative_slope) {
  BackwardCall c;
  c.in = resolve(a.x);
  c.epilogue = backward_epilogue(a.op, c.in, a.x, act, negative_slope, residual, mask,
                                 backend_of(a.x).mask_bytes(c.in));
  c.dy = in_layout_of(a.dy, c.in);
  if (a.x.numel() != 0) {
    c.weight = channel_vector(a.weight);
    c.bias = channel_vector(a.bias);
  }
  return c;
}

TensorPair backward_reduce(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const Tensor& mean, const Tensor& rstd, const OptionalTensor& mask,
                           std::string_view act, double negative_slope) {
  const GradientArguments arguments{"batch_norm_backward_reduce", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  const c10::DeviceGuard guard(x.device());
  BackwardCall c = backward_call(arguments, residual, mask, act, negative_slope);
  BackwardOutputs out;
  // In the accumulation type, as the gradients of parameters that are not given.
  out.sum_g = parameter_gradient_like(std::nullopt, x);
  out.sum_g_xhat = parameter_gradient_like(std::nullopt, x);
  if (x.numel() != 0) {
    c.statistics = known_statistics(mean, rstd);
    backend_of(x).backward(c, /*constant_statistics=*/false, out);
  }
  return {out.sum_g, out.sum_g_xhat};
}

TensorPair backward_apply(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& mean, const Tensor& rstd, const OptionalTensor& mask,
                          const Tensor& mean_dy, const Tensor& mean_dy_xhat, std::string_view act,
                          double negative_slope) {
  const GradientArguments arguments{"batch_norm_backward_apply", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  check_statistic(arguments.op, "mean_dy", mean_dy, x);
  check_statistic(arguments.op, "mean_dy_xhat", mean_dy_xhat, x);
  const c10::DeviceGuard guard(x.device());
  BackwardCall c = backward_call(arguments, residual, mask, act, negative_slope);
  BackwardOutputs out;
  out.dx = gradient_like(x, c.in, dy);
  if (given(residual) || c.epilogue.reads_mask()) out.dresidual = gradient_like(x, c.in, dy);
  if (x.numel() != 0) {
    c.statistics = known_statistics(mean, rstd);
    backend_of(x).backward_apply(c, mean_dy, mean_dy_xhat, out);
  }
  return {out.dx, out.dresidual};
}

}  // namespace

Gradients batch_norm_backward(const Tensor& dy, const Tensor& given_x,
                              const OptionalTensor& residual, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                              const OptionalTensor& running_var, const OptionalTensor& mean,
                              const OptionalTensor& rstd, bool train, double eps,
                              const OptionalTensor& mask, std::string_view act,
                              double negative_slope, std::array<bool, 4> output_mask,
                              bool any_layout) {
  const Tensor x = any_layout ? channels_last_as(dy, given_x, mask) : given_x;
  const GradientArguments arguments{"batch_norm_backward", dy, x, weight, bias};
  if (train) {
    TORCH_CHECK(given(mean) && given(rstd), arguments.op,
                ": with train=True, mean and rstd of the forward pass must be given");
    check_backward(arguments, *mean, *rstd);
  } else {
    check_input(arguments.op, "x", x);
    check_forward({x, residual, weight, bias, running_mean, running_var, std::nullopt,
                   /*training=*/false, 0.0, eps});
    check_gradient(arguments);
  }
  const c10::DeviceGuard guard(x.device());
  BackwardCall c = backward_call(arguments, residual, mask, act, negative_slope);
  BackwardOutputs out;
  if (output_mask[0]) out.dx = gradient_like(x, c.in, dy);
  if (output_mask[1]) out.dresidual = gradient_like(x, c.in, dy);
  if (output_mask[2]) out.sum_g_xhat = parameter_gradient_like(weight, x);
  if (output_mask[3]) out.sum_g = parameter_gradient_like(bias, x);
  if (x.numel() != 0) {
    c.statistics = train ? known_statistics(*mean, *rstd)
                         : Statistics{channel_vector(running_mean), channel_vector(running_var),
                                      /*is_rstd=*/false, eps};
    backend_of(x).backward(c, /*constant_statistics=*/!train, out);
  }
  return {out.dx, out.dresidual, out.sum_g_xhat, out.sum_g};
}

void register_backward(torch::Library& m) {
  m.impl("batch_norm_backward", batch_norm_backward);
  m.impl("batch_norm_backward_reduce", backward_reduce);
  m.impl("batch_norm_backward_apply", backward_apply);
}

}  // namespace bnorm_ext
