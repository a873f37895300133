// The backward operators on CUDA tensors: checks, allocation, plan, launches.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace bnorm_ext {
namespace cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// dx, with the means of dy and dy * xhat, or without where the statistics are constants.
Tensor input_gradient(const Tensor& g, const Tensor& x, const Input& in,
                      const OptionalTensor& weight, const Statistics& statistics,
                      const void* mean_dy, const void* mean_dy_xhat) {
  Tensor dx = gradient_like(x, in);
  if (x.numel() == 0) return dx;
  const bool is_aligned =
      aligned(g.const_data_ptr(), in.tensor.const_data_ptr(), dx.const_data_ptr());
  auto p = params_for<BackwardApplyParams>(in, plan_for(in, is_aligned));
  p.dy = g.const_data_ptr();
  p.dx = dx.data_ptr();
  p.statistics = statistics;
  p.weight = channel_vector(weight);
  p.mean_dy = mean_dy;
  p.mean_dy_xhat = mean_dy_xhat;
  C10_CUDA_CHECK(launch_backward_apply(p, stream()));
  return dx;
}

// `training` is false where the statistics are constants.
Gradients gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Statistics& statistics, bool training,
                    std::array<bool, 4> output_mask) {
  const Input in = resolve(x);
  const Tensor g = in_layout_of(dy, in);
  Tensor dx, dweight, dbias, means;
  if (output_mask[2]) dweight = parameter_gradient_like(weight, x);
  if (output_mask[3]) dbias = parameter_gradient_like(bias, x);
  void *mean_dy = nullptr, *mean_dy_xhat = nullptr;
  if (training && output_mask[0]) {
    means = at::empty({2, x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
    mean_dy = means[0].data_ptr();
    mean_dy_xhat = means[1].data_ptr();
  }
  if (x.numel() != 0 && (means.defined() || dweight.defined() || dbias.defined())) {
    const bool is_aligned = aligned(g.const_data_ptr(), in.tensor.const_data_ptr());
    auto p = params_for<BackwardReduceParams>(in, plan_for(in, is_aligned));
    const ExchangeMemory exchange(p.plan, in);
    p.dy = g.const_data_ptr();
    p.statistics = statistics;
    p.exchange = *exchange;
    p.sum_dy = channel_vector(dbias);
    p.sum_dy_xhat = channel_vector(dweight);
    p.mean_dy = mean_dy;
    p.mean_dy_xhat = mean_dy_xhat;
    C10_CUDA_CHECK(launch_backward_reduce(p, stream()));
  }
  if (output_mask[0]) dx = input_gradient(g, x, in, weight, statistics, mean_dy, mean_dy_xhat);
  return {dx, Tensor(), dweight, dbias};
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor&, std::string_view act, double,
                   std::array<bool, 4> output_mask) {
  check_activation(act, residual);
  check_backward({"batch_norm_backward", dy, x, weight, bias}, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  return gradients(dy, x, weight, bias, known(mean, rstd), /*training=*/true, output_mask);
}

Gradients inference_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps,
                             const OptionalTensor&, std::string_view act, double,
                             std::array<bool, 4> output_mask) {
  check_activation(act, residual);
  check_input("batch_norm_inference_backward", "x", x);
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const c10::cuda::CUDAGuard guard(x.device());
  check_gradient({"batch_norm_inference_backward", dy, x, weight, bias});
  const Statistics statistics{channel_vector(running_mean), channel_vector(running_var), false,
                              eps};
  return gradients(dy, x, weight, bias, statistics, /*training=*/false, output_mask);
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor&, std::string_view act, double) {
  check_activation(act, residual);
  check_backward({"batch_norm_backward_reduce", dy, x, weight, bias}, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  // Without parameters the sums come in the accumulation type.
  const auto [dx, dresidual, sum_dy_xhat, sum_dy] =
      gradients(dy, x, std::nullopt, std::nullopt, known(mean, rstd), /*training=*/true,
                {false, false, true, true});
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> backward_apply(
    const Tensor& dy, const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor&,
    const Tensor& mean_dy, const Tensor& mean_dy_xhat, std::string_view act, double) {
  const char* op = "batch_norm_backward_apply";
  check_activation(act, residual);
  check_backward({op, dy, x, weight, bias}, mean, rstd);
  check_statistic(op, "mean_dy", mean_dy, x);
  check_statistic(op, "mean_dy_xhat", mean_dy_xhat, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Input in = resolve(x);
  return {input_gradient(in_layout_of(dy, in), x, in, weight, known(mean, rstd),
                         mean_dy.const_data_ptr(), mean_dy_xhat.const_data_ptr()),
          Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, BNORM_EXT_CUDA_KEY, m) {
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
  m.impl("batch_norm_backward_reduce", backward_reduce);
  m.impl("batch_norm_backward_apply", backward_apply);
}

}  // namespace cuda
}  // namespace bnorm_ext
