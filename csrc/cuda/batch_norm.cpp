// The operators on CUDA tensors: checks, allocation, plan, launches.
//
// Everything runs on the current stream of x's device; nothing waits for it.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "tickets.h"

// The emulator registers the same operators beside the real ones.
#ifndef BNORM_EXT_CUDA_KEY
#define BNORM_EXT_CUDA_KEY CUDA
#endif

namespace bnorm_ext {
namespace cuda {
namespace {

using at::Tensor;

cudaStream_t stream() {
  return c10::cuda::getCurrentCUDAStream();
}

// Of the current device. The driver answers from its cache.
DeviceLimits limits() {
  DeviceLimits limits;
  const int device = c10::cuda::current_device();
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return limits;
}

template <typename... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Memory that the blocks of one launch of a reducing kernel exchange values through.
class ExchangeMemory {
 public:
  ExchangeMemory(const TwoPassPlan& plan, const Input& in) {
    if (plan.chunks == 1) return;
    const int64_t bytes = partials_of(plan, in.shape.layout) * static_cast<int64_t>(sizeof(Pair));
    partials_ = at::empty({bytes}, in.tensor.options().dtype(at::kByte));
    ticket_ = tickets(plan.tiles, in.tensor.options());
    exchange_ = {static_cast<Pair*>(partials_.data_ptr()),
                 reinterpret_cast<unsigned*>(ticket_.data_ptr<int32_t>())};
  }
  const Exchange& operator*() const { return exchange_; }

 private:
  Tensor partials_, ticket_;
  Exchange exchange_;
};

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

// What the reducing and the writing kernel of a direction take alike.
template <typename Params>
Params params_for(const Input& in, const TwoPassPlan& plan) {
  Params p;
  p.shape = in.shape;
  p.plan = plan;
  p.dtype = in.dtype;
  p.x = in.tensor.const_data_ptr();
  return p;
}

TwoPassPlan plan_for(const Input& in, bool is_aligned) {
  return plan_two_pass(in.shape, static_cast<int>(in.tensor.element_size()), is_aligned, limits());
}

Statistics known(const Tensor& mean, const Tensor& rstd) {
  return {channel_vector(mean), channel_vector(rstd), /*is_rstd=*/true, 0};
}

// y of x; the counter, where one is given, has been read by whoever needed it.
Tensor normalise(const Tensor& x, const Input& in, const OptionalTensor& weight,
                 const OptionalTensor& bias, const Statistics& statistics,
                 int64_t* num_batches_tracked = nullptr) {
  Tensor y = output_like(x, in);
  if (x.numel() == 0) return y;
  const bool is_aligned = aligned(in.tensor.const_data_ptr(), y.const_data_ptr());
  auto p = params_for<NormaliseParams>(in, plan_for(in, is_aligned));
  p.y = y.data_ptr();
  p.statistics = statistics;
  p.weight = channel_vector(weight);
  p.bias = channel_vector(bias);
  p.num_batches_tracked = num_batches_tracked;
  C10_CUDA_CHECK(launch_normalise(p, stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> training(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, std::string_view act, double) {
  check_activation(act, residual);
  const ForwardArguments arguments{x,
                                   weight,
                                   bias,
                                   running_mean,
                                   running_var,
                                   num_batches_tracked,
                                   /*training=*/true,
                                   momentum,
                                   eps};
  check_forward(arguments);
  const c10::cuda::CUDAGuard guard(x.device());
  const Input in = resolve(x);
  Tensor mean = statistic_like(x), rstd = statistic_like(x);
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    if (given(num_batches_tracked)) num_batches_tracked->add_(1);
    return {output_like(x, in), mean, rstd, no_mask(x)};
  }
  auto p = params_for<StatisticsParams>(in, plan_for(in, aligned(in.tensor.const_data_ptr())));
  const ExchangeMemory exchange(p.plan, in);
  p.exchange = *exchange;
  p.eps = eps;
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.running = running_update(arguments);
  C10_CUDA_CHECK(launch_statistics(p, stream()));
  Tensor y = normalise(x, in, weight, bias, known(mean, rstd), p.running.num_batches_tracked);
  return {y, mean, rstd, no_mask(x)};
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double) {
  check_activation(act, residual);
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const c10::cuda::CUDAGuard guard(x.device());
  const Input in = resolve(x);
  Statistics statistics{channel_vector(running_mean), channel_vector(running_var), false, eps};
  return {normalise(x, in, weight, bias, statistics), no_mask(x)};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& mean, const Tensor& rstd, std::string_view act,
                                 double) {
  check_activation(act, residual);
  check_backward({"batch_norm_apply", x, x, weight, bias}, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  return {normalise(x, resolve(x), weight, bias, known(mean, rstd)), no_mask(x)};
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  check_input("batch_norm_stats", "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return {at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options)};
  const Input in = resolve(x);
  Tensor mean = at::empty({x.size(1)}, options), var = at::empty({x.size(1)}, options);
  auto p = params_for<StatisticsParams>(in, plan_for(in, aligned(in.tensor.const_data_ptr())));
  const ExchangeMemory exchange(p.plan, in);
  p.exchange = *exchange;
  p.wide_mean = mean.data_ptr<double>();
  p.wide_var = var.data_ptr<double>();
  C10_CUDA_CHECK(launch_statistics(p, stream()));
  return {mean, var};
}

std::tuple<Tensor, Tensor> merge_stats(const Tensor& mean, const Tensor& var, const Tensor& count,
                                       const OptionalTensor& running_mean,
                                       const OptionalTensor& running_var,
                                       const OptionalTensor& num_batches_tracked,
                                       std::optional<double> momentum, double eps,
                                       at::ScalarType dtype) {
  check_merge("batch_norm_merge_stats", mean, var, count);
  const c10::cuda::CUDAGuard guard(mean.device());
  // The running statistics are checked as those of a batch; that it holds more than one value per
  // channel is only known on the device, which is not waited for.
  const Tensor like = at::empty({2, mean.size(1)}, mean.options().dtype(dtype));
  const ForwardArguments arguments{
      like,        std::nullopt,        std::nullopt,      running_mean,
      running_var, num_batches_tracked, /*training=*/true, momentum,
      eps};
  check_forward(arguments);
  Tensor merged_mean = statistic_like(like), merged_rstd = statistic_like(like);
  const Tensor means = mean.contiguous(), vars = var.contiguous(), counts = count.contiguous();
  MergeParams p;
  p.W = mean.size(0);
  p.C = mean.size(1);
  p.mean = means.const_data_ptr<double>();
  p.var = vars.const_data_ptr<double>();
  p.count = counts.const_data_ptr<double>();
  p.dtype = dtype_of(merged_mean);
  p.eps = eps;
  p.merged_mean = merged_mean.data_ptr();
  p.merged_rstd = merged_rstd.data_ptr();
  p.running = running_update(arguments);
  C10_CUDA_CHECK(launch_merge(p, stream()));
  return {merged_mean, merged_rstd};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// `training` is false where the statistics are constants.
Gradients gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Statistics& statistics, bool training,
                    std::array<bool, 4> output_mask) {
  const Input in = resolve(x);
  const Tensor g = in_layout_of(dy, in);
  Tensor dx, dweight, dbias, means;
  if (output_mask[0]) dx = gradient_like(x, in);
  const auto like = [&](const OptionalTensor& t) {
    return given(t) ? at::empty_like(*t, at::MemoryFormat::Contiguous) : statistic_like(x);
  };
  if (output_mask[2]) dweight = like(weight);
  if (output_mask[3]) dbias = like(bias);
  if (x.numel() == 0) {
    if (dweight.defined()) dweight.zero_();
    if (dbias.defined()) dbias.zero_();
    return {dx, Tensor(), dweight, dbias};
  }
  const void *dy_data = g.const_data_ptr(), *x_data = in.tensor.const_data_ptr();
  const bool needs_means = training && dx.defined();
  if (needs_means) {
    means = at::empty({2, x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
  }
  if (needs_means || dweight.defined() || dbias.defined()) {
    auto p = params_for<BackwardReduceParams>(in, plan_for(in, aligned(dy_data, x_data)));
    const ExchangeMemory exchange(p.plan, in);
    p.dy = dy_data;
    p.statistics = statistics;
    p.exchange = *exchange;
    p.sum_dy = channel_vector(dbias);
    p.sum_dy_xhat = channel_vector(dweight);
    if (needs_means) {
      p.mean_dy = means[0].data_ptr();
      p.mean_dy_xhat = means[1].data_ptr();
    }
    C10_CUDA_CHECK(launch_backward_reduce(p, stream()));
  }
  if (dx.defined()) {
    const bool is_aligned = aligned(dy_data, x_data, dx.const_data_ptr());
    auto p = params_for<BackwardApplyParams>(in, plan_for(in, is_aligned));
    p.dy = dy_data;
    p.dx = dx.data_ptr();
    p.statistics = statistics;
    p.weight = channel_vector(weight);
    if (needs_means) {
      p.mean_dy = means[0].const_data_ptr();
      p.mean_dy_xhat = means[1].const_data_ptr();
    }
    C10_CUDA_CHECK(launch_backward_apply(p, stream()));
  }
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
  Tensor dx = gradient_like(x, in);
  if (x.numel() == 0) return {dx, Tensor()};
  const Tensor g = in_layout_of(dy, in);
  const bool is_aligned =
      aligned(g.const_data_ptr(), in.tensor.const_data_ptr(), dx.const_data_ptr());
  auto p = params_for<BackwardApplyParams>(in, plan_for(in, is_aligned));
  p.dy = g.const_data_ptr();
  p.dx = dx.data_ptr();
  p.statistics = known(mean, rstd);
  p.weight = channel_vector(weight);
  p.mean_dy = mean_dy.const_data_ptr();
  p.mean_dy_xhat = mean_dy_xhat.const_data_ptr();
  C10_CUDA_CHECK(launch_backward_apply(p, stream()));
  return {dx, Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, BNORM_EXT_CUDA_KEY, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  m.impl("batch_norm_stats", stats);
  m.impl("batch_norm_merge_stats", merge_stats);
  m.impl("batch_norm_apply", apply);
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
  m.impl("batch_norm_backward_reduce", backward_reduce);
  m.impl("batch_norm_backward_apply", backward_apply);
}

}  // namespace cuda
}  // namespace bnorm_ext
