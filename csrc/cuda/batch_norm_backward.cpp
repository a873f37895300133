// The backward operators on CUDA tensors: checks, allocation, plan, launches.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "resident.h"

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

  // Whether what is read and what is written can be accessed by vectors.
  bool is_aligned(const Tensor& dx, const Tensor& dresidual) const {
    return aligned(dy.const_data_ptr(), in.tensor.const_data_ptr(),
                   epilogue_params(epilogue).residual, data_of(dx), data_of(dresidual));
  }

  template <typename Params>
  Params params() const {
    Params p;
    p.shape = in.shape;
    p.dtype = in.dtype;
    p.dy = dy.const_data_ptr();
    p.x = in.tensor.const_data_ptr();
    p.statistics = statistics;
    p.weight = channel_vector(weight);
    p.bias = channel_vector(bias);
    p.epilogue = epilogue_params(epilogue);
    if (epilogue.reads_mask()) {
      p.mask = mask_of(in.shape, epilogue.mask.const_data_ptr<uint8_t>());
    }
    return p;
  }
};

Call call(const GradientArguments& a, const OptionalTensor& residual, const Statistics& statistics,
          const OptionalTensor& mask, std::string_view act, double negative_slope) {
  Input in = resolve(a.x);
  Epilogue epilogue = backward_epilogue(a.op, in, a.x, act, negative_slope, residual, mask,
                                        mask_bytes(in.shape, element_bytes(in)));
  in.tensor = aligned_if_grouped(in.tensor, in);
  epilogue.residual = aligned_if_grouped(epilogue.residual, in);
  Tensor dy = aligned_if_grouped(in_layout_of(a.dy, in), in);
  return {a.x, std::move(in), std::move(dy), std::move(epilogue), a.weight, a.bias, statistics};
}

// The sums of g and g * xhat, and their means, for whatever is not absent. x is not empty.
void reduce(const Call& c, const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat,
            void* mean_dy, void* mean_dy_xhat) {
  auto p = c.params<BackwardReduceParams>();
  p.plan = plan_for(c.in, c.is_aligned({}, {}));
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
void apply(const Call& c, const Tensor& dx, const Tensor& dresidual, const void* mean_dy,
           const void* mean_dy_xhat) {
  if (c.x.numel() == 0 || !(dx.defined() || dresidual.defined())) return;
  auto p = c.params<BackwardApplyParams>();
  p.plan = plan_for(c.in, c.is_aligned(dx, dresidual));
  if (dx.defined()) p.dx = dx.data_ptr();
  if (dresidual.defined()) p.dresidual = dresidual.data_ptr();
  p.mean_dy = mean_dy;
  p.mean_dy_xhat = mean_dy_xhat;
  C10_CUDA_CHECK(launch_backward_apply(p, stream()));
}

// Everything in one launch. False where it takes two.
bool run_resident(const Call& c, bool training, const Tensor& dx, const Tensor& dresidual,
                  const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat) {
  auto p = c.params<ResidentBackwardParams>();
  p.plan = plan_backward(c.in, c.is_aligned(dx, dresidual));
  if (p.plan.path == Path::TwoPass) return false;
  const TeamMemory memory(p.plan, c.in, /*counts_tiles=*/false);
  p.exchange = *memory;
  p.dx = dx.data_ptr();
  if (dresidual.defined()) p.dresidual = dresidual.data_ptr();
  p.constant_statistics = !training;
  p.sum_dy = channel_vector(sum_dy);
  p.sum_dy_xhat = channel_vector(sum_dy_xhat);
  return is_launched(launch_resident_backward(p, stream()));
}

// `training` is false where the statistics are constants.
Gradients gradients(const Call& c, bool training, std::array<bool, 4> output_mask) {
  Tensor dx, dresidual, dweight, dbias, means;
  if (output_mask[0]) dx = gradient_like(c.x, c.in);
  if (output_mask[1]) dresidual = gradient_like(c.x, c.in);
  if (output_mask[2]) dweight = parameter_gradient_like(c.weight, c.x);
  if (output_mask[3]) dbias = parameter_gradient_like(c.bias, c.x);
  const bool reads_twice = dx.defined() && (training || dweight.defined() || dbias.defined());
  if (c.x.numel() == 0 ||
      (reads_twice && run_resident(c, training, dx, dresidual, dbias, dweight))) {
    return {dx, dresidual, dweight, dbias};
  }
  void *mean_dy = nullptr, *mean_dy_xhat = nullptr;
  if (training && dx.defined()) {
    means = at::empty({2, c.x.size(1)}, c.x.options().dtype(accumulation_type(c.x.scalar_type())));
    mean_dy = means[0].data_ptr();
    mean_dy_xhat = means[1].data_ptr();
  }
  if (means.defined() || dweight.defined() || dbias.defined()) {
    reduce(c, dbias, dweight, mean_dy, mean_dy_xhat);
  }
  apply(c, dx, dresidual, mean_dy, mean_dy_xhat);
  return {dx, dresidual, dweight, dbias};
}

Gradients backward(const Tensor& dy, const Tensor& given_x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor& mask, std::string_view act,
                   double negative_slope, std::array<bool, 4> output_mask, bool any_layout) {
  const Tensor x = any_layout ? channels_last_as(dy, given_x, mask) : given_x;
  const GradientArguments arguments{"batch_norm_backward", dy, x, weight, bias};
  check_backward(arguments, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  return gradients(call(arguments, residual, known(mean, rstd), mask, act, negative_slope),
                   /*training=*/true, output_mask);
}

Gradients inference_backward(const Tensor& dy, const Tensor& given_x,
                             const OptionalTensor& residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& running_mean,
                             const Tensor& running_var, double eps, const OptionalTensor& mask,
                             std::string_view act, double negative_slope,
                             std::array<bool, 4> output_mask, bool any_layout) {
  const Tensor x = any_layout ? channels_last_as(dy, given_x, mask) : given_x;
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
  Tensor dx = gradient_like(x, c.in), dresidual;
  if (given(residual)) dresidual = gradient_like(x, c.in);
  apply(c, dx, dresidual, mean_dy.const_data_ptr(), mean_dy_xhat.const_data_ptr());
  return {dx, dresidual};
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
