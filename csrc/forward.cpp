// The forward operators on every device: checks, the view of the tensors as [N, C, S], allocation;
// then the device's kernels (backend.h).
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "memory.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;

// The checked call, with its outputs. op: named in errors.
ForwardCall forward_call(const char* op, const Tensor& x, const OptionalTensor& residual,
                         const OptionalTensor& weight, const OptionalTensor& bias,
                         std::string_view act, double negative_slope, bool save_mask) {
  ForwardCall c;
  c.in = resolve(x);
  c.epilogue = forward_epilogue(op, c.in, x, act, negative_slope, residual);
  c.y = output_like(x, c.in);
  const bool has_mask = save_mask && c.epilogue.leaves_mask() && x.numel() != 0;
  c.mask = at::empty({has_mask ? backend_of(x).mask_bytes(c.in) : 0}, x.options().dtype(at::kByte));
  if (x.numel() != 0) {
    c.weight = channel_vector(weight);
    c.bias = channel_vector(bias);
  }
  return c;
}

RunningUpdate running_update(const ForwardArguments& a) {
  RunningUpdate running;
  running.mean = channel_vector(a.running_mean);
  running.var = channel_vector(a.running_var);
  if (given(a.num_batches_tracked)) {
    running.num_batches_tracked = a.num_batches_tracked->data_ptr<int64_t>();
  }
  running.momentum = a.momentum.value_or(0);
  running.cumulative = !a.momentum && running.num_batches_tracked != nullptr;
  return running;
}

TensorPair stats(const Tensor& x) {
  check_input("batch_norm_stats", "x", x);
  const c10::DeviceGuard guard(x.device());
  Input in = resolve(x);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return {at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options)};
  Tensor mean = at::empty({x.size(1)}, options), var = at::empty({x.size(1)}, options);
  backend_of(x).statistics(in, mean, var);
  return {mean, var};
}

TensorPair apply(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                 const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                 std::string_view act, double negative_slope, bool save_mask) {
  const char* op = "batch_norm_apply";
  check_backward({op, x, x, weight, bias}, mean, rstd);
  const c10::DeviceGuard guard(x.device());
  ForwardCall c = forward_call(op, x, residual, weight, bias, act, negative_slope, save_mask);
  if (x.numel() != 0) backend_of(x).normalise(c, known_statistics(mean, rstd));
  return {c.y, c.mask};
}

}  // namespace

ForwardOutputs batch_norm_training(const Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& num_batches_tracked,
                                   std::optional<double> momentum, double eps, std::string_view act,
                                   double negative_slope, bool save_mask) {
  const ForwardArguments arguments{x,
                                   residual,
                                   weight,
                                   bias,
                                   running_mean,
                                   running_var,
                                   num_batches_tracked,
                                   /*training=*/true,
                                   momentum,
                                   eps};
  check_forward(arguments);
  const c10::DeviceGuard guard(x.device());
  ForwardCall c =
      forward_call("batch_norm", x, residual, weight, bias, act, negative_slope, save_mask);
  Tensor mean = mean_like(x), rstd = statistic_like(x);
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    if (given(num_batches_tracked)) num_batches_tracked->add_(1);
  } else {
    backend_of(x).train(c, eps, running_update(arguments), mean, rstd);
  }
  return {c.y, mean, rstd, c.mask};
}

TensorPair batch_norm_inference(const Tensor& x, const OptionalTensor& residual,
                                const OptionalTensor& weight, const OptionalTensor& bias,
                                const Tensor& running_mean, const Tensor& running_var, double eps,
                                std::string_view act, double negative_slope, bool save_mask) {
  check_forward({x, residual, weight, bias, running_mean, running_var, std::nullopt,
                 /*training=*/false, 0.0, eps});
  const c10::DeviceGuard guard(x.device());
  ForwardCall c =
      forward_call("batch_norm", x, residual, weight, bias, act, negative_slope, save_mask);
  if (x.numel() != 0) {
    backend_of(x).normalise(c, {channel_vector(running_mean), channel_vector(running_var),
                                /*is_rstd=*/false, eps});
  }
  return {c.y, c.mask};
}

TensorPair batch_norm_merge_stats(const Tensor& mean, const Tensor& var, const Tensor& count,
                                  const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var,
                                  const OptionalTensor& num_batches_tracked,
                                  std::optional<double> momentum, double eps,
                                  at::ScalarType dtype) {
  check_merge("batch_norm_merge_stats", mean, var, count);
  const c10::DeviceGuard guard(mean.device());
  // The running statistics are checked as those of a batch. That it holds more than one value per
  // channel the backend checks, unless it would have to wait for the device.
  const Tensor like = at::empty({2, mean.size(1)}, mean.options().dtype(dtype));
  const ForwardArguments arguments{
      like,        std::nullopt,        std::nullopt,      std::nullopt, running_mean,
      running_var, num_batches_tracked, /*training=*/true, momentum,     eps};
  check_forward(arguments);
  check_apart({or_null(running_mean), or_null(running_var), or_null(num_batches_tracked)},
              {&mean, &var, &count});
  Tensor merged_mean = mean_like(like), merged_rstd = statistic_like(like);
  backend_of(mean).merge(mean.contiguous(), var.contiguous(), count.contiguous(), eps,
                         running_update(arguments), merged_mean, merged_rstd);
  return {merged_mean, merged_rstd};
}

void register_forward(torch::Library& m) {
  m.impl("batch_norm_training", batch_norm_training);
  m.impl("batch_norm_inference", batch_norm_inference);
  m.impl("batch_norm_stats", stats);
  m.impl("batch_norm_merge_stats", batch_norm_merge_stats);
  m.impl("batch_norm_apply", apply);
}

}  // namespace bnorm_ext
