// The forward operators on CUDA tensors: checks, allocation, plan, launches.
//
// Everything runs on the current stream of x's device; nothing waits for it.
#include <torch/library.h>

#include <tuple>

#include "resident.h"

namespace bnorm_ext {
namespace cuda {
namespace {

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

// What a forward pass reads and writes.
struct Call {
  const Tensor& x;
  Input in;  // of x
  Epilogue epilogue;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  Tensor y, mask;
  bool is_aligned;  // all of them

  Call(const char* op, const Tensor& x, const OptionalTensor& residual,
       const OptionalTensor& weight, const OptionalTensor& bias, std::string_view act,
       double negative_slope, bool save_mask)
      : x(x),
        in(resolve(x)),
        epilogue(forward_epilogue(op, in, x, act, negative_slope, residual)),
        weight(weight),
        bias(bias),
        y(output_like(x, in)) {
    in.tensor = aligned_if_grouped(in.tensor, in);
    epilogue.residual = aligned_if_grouped(epilogue.residual, in);
    const bool has_mask = save_mask && epilogue.leaves_mask() && x.numel() != 0;
    mask = new_mask(x, has_mask ? mask_bytes(in.shape, element_bytes(in)) : 0);
    is_aligned =
        aligned(in.tensor.const_data_ptr(), y.const_data_ptr(), data_of(epilogue.residual));
  }

  // What all kernels that write y take.
  template <typename Params>
  Params params() const {
    Params p;
    p.shape = in.shape;
    p.dtype = in.dtype;
    p.x = in.tensor.const_data_ptr();
    p.y = y.data_ptr();
    p.weight = channel_vector(weight);
    p.bias = channel_vector(bias);
    p.epilogue = epilogue_params(epilogue);
    if (mask.numel() != 0) p.mask = mask_of(in.shape, mask.data_ptr<uint8_t>());
    return p;
  }
};

// The counter, where one is given, has been read by whoever needed it.
std::tuple<Tensor, Tensor> normalise(const Call& c, const Statistics& statistics,
                                     int64_t* num_batches_tracked = nullptr) {
  if (c.x.numel() == 0) return {c.y, c.mask};
  auto p = c.params<NormaliseParams>();
  p.plan = plan_for(c.in, c.is_aligned);
  p.statistics = statistics;
  p.num_batches_tracked = num_batches_tracked;
  C10_CUDA_CHECK(launch_normalise(p, stream()));
  return {c.y, c.mask};
}

// Everything in one launch. False where it takes two.
bool train_resident(const Call& c, const RunningUpdate& running, double eps, const Tensor& mean,
                    const Tensor& rstd) {
  auto p = c.params<ResidentForwardParams>();
  p.plan = plan_forward(c.in, c.is_aligned);
  if (p.plan.path == Path::TwoPass) return false;
  const TeamMemory memory(p.plan, c.in, running.cumulative && p.plan.tile_plan.tiles > 1);
  p.staging = *memory;
  p.tiles_done = memory.tiles_done();
  p.eps = eps;
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.running = running;
  return is_launched(launch_resident_forward(p, stream()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> training(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum, double eps, std::string_view act, double negative_slope,
    bool save_mask) {
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
  const Call c("batch_norm_training", x, residual, weight, bias, act, negative_slope, save_mask);
  Tensor mean = statistic_like(x), rstd = statistic_like(x);
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    if (given(num_batches_tracked)) num_batches_tracked->add_(1);
    return {c.y, mean, rstd, c.mask};
  }
  const RunningUpdate running = running_update(arguments);
  if (train_resident(c, running, eps, mean, rstd)) return {c.y, mean, rstd, c.mask};
  auto p =
      params_for<StatisticsParams>(c.in, plan_for(c.in, aligned(c.in.tensor.const_data_ptr())));
  const StagingMemory staging(p.plan, c.in);
  p.staging = *staging;
  p.eps = eps;
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.running = running;
  // What rounding the mean leaves out goes into y too, where backward does not make z again.
  Tensor wide_mean;
  if (c.epilogue.act == Activation::Identity && c.in.dtype != DType::Double) {
    wide_mean = at::empty({x.size(1)}, x.options().dtype(at::kDouble));
    p.wide_mean = wide_mean.data_ptr<double>();
  }
  C10_CUDA_CHECK(launch_statistics(p, stream()));
  normalise(c, known(wide_mean.defined() ? wide_mean : mean, rstd), running.num_batches_tracked);
  return {c.y, mean, rstd, c.mask};
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double negative_slope,
                                     bool save_mask) {
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const c10::cuda::CUDAGuard guard(x.device());
  const Call c("batch_norm_inference", x, residual, weight, bias, act, negative_slope, save_mask);
  return normalise(c, {channel_vector(running_mean), channel_vector(running_var), false, eps});
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& mean, const Tensor& rstd, std::string_view act,
                                 double negative_slope, bool save_mask) {
  const char* op = "batch_norm_apply";
  check_backward({op, x, x, weight, bias}, mean, rstd);
  const c10::cuda::CUDAGuard guard(x.device());
  const Call c(op, x, residual, weight, bias, act, negative_slope, save_mask);
  return normalise(c, known(mean, rstd));
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  check_input("batch_norm_stats", "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return {at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options)};
  Input in = resolve(x);
  in.tensor = aligned_if_grouped(in.tensor, in);
  Tensor mean = at::empty({x.size(1)}, options), var = at::empty({x.size(1)}, options);
  auto p = params_for<StatisticsParams>(in, plan_for(in, aligned(in.tensor.const_data_ptr())));
  const StagingMemory staging(p.plan, in);
  p.staging = *staging;
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

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, BNORM_EXT_CUDA_KEY, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  m.impl("batch_norm_stats", stats);
  m.impl("batch_norm_merge_stats", merge_stats);
  m.impl("batch_norm_apply", apply);
}

}  // namespace cuda
}  // namespace bnorm_ext
