// The backward operators on CUDA tensors: checks, allocation, plan, launches.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace bnorm_ext {
namespace cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What both kernels read.
struct Call {
  const Tensor& x;
  Input in;   // of x
  Tensor dy;  // in the layout of `in`
  Epilogue epilogue;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  Statistics statistics;

  // `is_aligned`: what is written, for the plan.
  template <typename Params>
  Params params(bool is_aligned) const {
    const EpilogueParams e = epilogue_params(epilogue);
    is_aligned = is_aligned && aligned(dy.const_data_ptr(), in.tensor.const_data_ptr(), e.residual);
    auto p = params_for<Params>(in, plan_for(in, is_aligned));
    p.dy = dy.const_data_ptr();
    p.statistics = statistics;
    p.weight = channel_vector(weight);
    p.bias = channel_vector(bias);
    p.epilogue = e;
    if (epilogue.reads_mask()) {
      p.mask = mask_of(in.shape, epilogue.mask.const_data_ptr<uint8_t>());
    }
    return p;
  }
};

Call call(const GradientArguments& a, const OptionalTensor& residual, const Statistics& statistics,
          const OptionalTensor& mask, std::string_view act, double negative_slope) {
  Input in = resolve(a.x);
  Epilogue epilogue =
      backward_epilogue(a.op, in, a.x, act, negative_slope, residual, mask, mask_bytes(in.shape));
  Tensor dy = in_layout_of(a.dy, in);
  return {a.x, std::move(in), std::move(dy), std::move(epilogue), a.weight, a.bias, statistics};
}

// The sums of g and g * xhat, and their means, for whatever is not absent. x is not empty.
void reduce(const Call& c, const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat,
            void* mean_dy, void* mean_dy_xhat) {
  auto p = c.params<BackwardReduceParams>(true);
  const ExchangeMemory exchange(p.plan, c.in);
  p.exchange = *exchange;
  p.sum_dy = channel_vector(sum_dy);
  p.sum_dy_xhat = channel_vector(sum_dy_xhat);
  p.mean_dy = mean_dy;
  p.mean_dy_xhat = mean_dy_xhat;
  C10_CUDA_CHECK(launch_backward_reduce(p, stream()));
}

// dx and dresidual, those that are wanted, with the means of g and g * xhat, or without where the
// statistics are constants.
std::tuple<Tensor, Tensor> apply(const Call& c, bool wants_dx, bool wants_dresidual,
                                 const void* mean_dy, const void* mean_dy_xhat) {
  Tensor dx, dresidual;
  if (wants_dx) dx = gradient_like(c.x, c.in);
  if (wants_dresidual) dresidual = gradient_like(c.x, c.in);
  if (c.x.numel() == 0 || !(wants_dx || wants_dresidual)) return {dx, dresidual};
  auto p = c.params<BackwardApplyParams>(aligned(data_of(dx), data_of(dresidual)));
  if (wants_dx) p.dx = dx.data_ptr();
  if (wants_dresidual) p.dresidual = dresidual.data_ptr();
  p.mean_dy = mean_dy;
  p.mean_dy_xhat = mean_dy_xhat;
  C10_CUDA_CHECK(launch_backward_apply(p, stream()));
  return {dx, dresidual};
}

// `training` is false where the statistics are constants.
Gradients gradients(const Call& c, bool training, std::array<bool, 4> output_mask) {
  Tensor dweight, dbias, means;
  if (output_mask[2]) dweight = parameter_gradient_like(c.weight, c.x);
  if (output_mask[3]) dbias = parameter_gradient_like(c.bias, c.x);
  void *mean_dy = nullptr, *mean_dy_xhat = nullptr;
  if (training && output_mask[0]) {
    means = at::empty({2, c.x.size(1)}, c.x.options().dtype(accumulation_type(c.x.scalar_type())));
    mean_dy = means[0].data_ptr();
    mean_dy_xhat = means[1].data_ptr();
  }
  if (c.x.numel() != 0 && (means.defined() || dweight.defined() || dbias.defined())) {
    reduce(c, dbias, dweight, mean_dy, mean_dy_xhat);
  }
  const auto [dx, dresidual] = apply(c, output_mask[0], output_mask[1], mean_dy, mean_dy_xhat);
  return {dx, dresidual, dweight, dbias};
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor& mask, std::string_view act,
                   double negative_slope, std::array<bool, 4> output_mask) {
  const GradientArguments arguments{"batch_norm_backward", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  return gradients(call(arguments, residual, known(mean, rstd), mask, act, negative_slope),
                   /*training=*/true, output_mask);
}

Gradients inference_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps,
                             const OptionalTensor& mask, std::string_view act,
                             double negative_slope, std::array<bool, 4> output_mask) {
  const GradientArguments arguments{"batch_norm_inference_backward", dy, x, weight, bias};
  check_input(arguments.op, "x", x);
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const c10::cuda::CUDAGuard guard(x.device());
  check_gradient(arguments);
  const Statistics statistics{channel_vector(running_mean), channel_vector(running_var), false,
                              eps};
  return gradients(call(arguments, residual, statistics, mask, act, negative_slope),
                   /*training=*/false, output_mask);
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor& mask, std::string_view act,
                                           double negative_slope) {
  const GradientArguments arguments{"batch_norm_backward_reduce", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  const Call c = call(arguments, residual, known(mean, rstd), mask, act, negative_slope);
  // In the accumulation type, as without parameters.
  const Tensor sum_dy = parameter_gradient_like(std::nullopt, x);
  const Tensor sum_dy_xhat = parameter_gradient_like(std::nullopt, x);
  if (x.numel() != 0) reduce(c, sum_dy, sum_dy_xhat, nullptr, nullptr);
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dy, const Tensor& x,
                                          const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& mean, const Tensor& rstd,
                                          const OptionalTensor& mask, const Tensor& mean_dy,
                                          const Tensor& mean_dy_xhat, std::string_view act,
                                          double negative_slope) {
  const GradientArguments arguments{"batch_norm_backward_apply", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  check_statistic(arguments.op, "mean_dy", mean_dy, x);
  check_statistic(arguments.op, "mean_dy_xhat", mean_dy_xhat, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Call c = call(arguments, residual, known(mean, rstd), mask, act, negative_slope);
  return apply(c, /*wants_dx=*/true, /*wants_dresidual=*/given(residual), mean_dy.const_data_ptr(),
               mean_dy_xhat.const_data_ptr());
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
