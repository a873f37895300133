// The forward operators on CPU tensors: checks, allocation, per-channel coefficients, and which
// kernels to run (parallel.h runs them, forward_kernels.h is what they do).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <tuple>

#include "channel.h"
#include "huge_pages.h"
#include "parallel.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// One where backward needs it.
Tensor mask_for(const Input& in, const Tensor& x, const Epilogue& e, bool save_mask) {
  if (!save_mask || !e.leaves_mask() || x.numel() == 0) return new_mask(x, 0);
  Tensor mask = new_mask(x, MaskRows(as_channels_first(in.shape)).bytes());
  // What the kernels only read.
  std::memset(mask.data_ptr<uint8_t>() + mask.numel() - kMaskSlack, 0, kMaskSlack);
  return mask;
}

// Everything but the coefficients.
ForwardParams forward_params(const Input& in, const Tensor& y, const Epilogue& e,
                             const Tensor& mask) {
  ForwardParams p;
  p.act = e.act;
  p.slope = e.slope;
  p.residual = e.residual.defined() ? e.residual.const_data_ptr() : nullptr;
  p.mask = mask.numel() > 0 ? mask.data_ptr<uint8_t>() : nullptr;
  p.shape = as_channels_first(in.shape);
  p.dtype = in.dtype;
  p.x = in.tensor.const_data_ptr();
  p.y = y.data_ptr();
  p.nontemporal = is_nontemporal(p.shape, y.element_size(), p.residual != nullptr ? 3 : 2);
  return p;
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
  const Input in = resolve(x);
  const Epilogue e = forward_epilogue("batch_norm", in, x, act, negative_slope, residual);
  Tensor y = in_huge_pages(output_like(x, in)), mask = mask_for(in, x, e, save_mask);
  Tensor mean = statistic_like(x), rstd = statistic_like(x);
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    if (given(num_batches_tracked)) num_batches_tracked->add_(1);
    return {y, mean, rstd, mask};
  }
  const RunningStatistics running(arguments, in.shape.count());
  const ChannelVector w = channel_vector(weight), b = channel_vector(bias);
  with_accumulator(in.dtype, [&](auto zero) {
    using A = decltype(zero);
    Coefficients<A> coefficients(2, in.shape.C);
    A *scale = coefficients[0], *shift = coefficients[1];
    A *mean_of = mean.data_ptr<A>(), *rstd_of_c = rstd.data_ptr<A>();
    ForwardParams p = forward_params(in, y, e, mask);
    p.mean = mean_of;
    p.scale = scale;
    p.shift = shift;
    const int64_t block_channels =
        cache_block_channels(p.shape, x.element_size(), p.nontemporal, at::get_num_threads(),
                             /*writes_mask=*/p.mask != nullptr);
    p.prefetch_distance = prefetch_distance(p.shape, block_channels);
    const auto moments = kernels().moments[static_cast<int>(in.dtype)];
    const auto apply = kernels().apply[static_cast<int>(in.dtype)];
    two_passes<Moments, ChannelMoments>(
        p.shape, block_channels,
        [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
          moments(p, span, c0, c1, out);
        },
        [&](int64_t c, const ChannelMoments& total) {
          const auto [batch_mean, var] = total.result();
          mean_of[c] = static_cast<A>(batch_mean);
          rstd_of_c[c] = static_cast<A>(rstd_of<A>(var, eps));
          scale[c] = static_cast<A>(get_or(w, c, 1)) * rstd_of_c[c];
          const bool is_seen_again = e.act != Activation::Identity;
          shift[c] = static_cast<A>(
              shift_of(get_or(b, c, 0), is_seen_again ? 0 : batch_mean - mean_of[c], scale[c]));
          running.update(c, batch_mean, var);
        },
        [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); }, true);
  });
  running.count_batch();
  return {y, mean, rstd, mask};
}

// y and the mask from statistics that are known, given per channel by mean_of(c) and rstd_of(c).
template <typename MeanOf, typename RstdOf>
std::tuple<Tensor, Tensor> normalise_with(const Tensor& x, const Input& in,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Epilogue& e, bool save_mask, MeanOf mean_of,
                                          RstdOf rstd_of) {
  Tensor y = in_huge_pages(output_like(x, in)), mask = mask_for(in, x, e, save_mask);
  if (x.numel() == 0) return {y, mask};
  const ChannelVector w = channel_vector(weight), b = channel_vector(bias);
  with_accumulator(in.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t C = in.shape.C;
    Coefficients<A> coefficients(3, C);
    A *mean = coefficients[0], *scale = coefficients[1], *shift = coefficients[2];
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = static_cast<A>(mean_of(c));
      scale[c] = static_cast<A>(get_or(w, c, 1)) * static_cast<A>(rstd_of(c));
      shift[c] = static_cast<A>(get_or(b, c, 0));
    }
    ForwardParams p = forward_params(in, y, e, mask);
    p.mean = mean;
    p.scale = scale;
    p.shift = shift;
    const auto apply = kernels().apply[static_cast<int>(in.dtype)];
    one_pass(p.shape, [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); });
  });
  return {y, mask};
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double negative_slope,
                                     bool save_mask) {
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const Input in = resolve(x);
  const Epilogue e = forward_epilogue("batch_norm", in, x, act, negative_slope, residual);
  const ChannelVector mean = channel_vector(running_mean), var = channel_vector(running_var);
  const bool is_double = x.scalar_type() == at::kDouble;
  return normalise_with(
      x, in, weight, bias, e, save_mask, [&](int64_t c) { return get(mean, c); },
      [&](int64_t c) {
        return is_double ? rstd_of<double>(get(var, c), eps) : rstd_of<float>(get(var, c), eps);
      });
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& mean, const Tensor& rstd, std::string_view act,
                                 double negative_slope, bool save_mask) {
  const char* op = "batch_norm_apply";
  check_backward({op, x, x, weight, bias}, mean, rstd);
  const Input in = resolve(x);
  const Epilogue e = forward_epilogue(op, in, x, act, negative_slope, residual);
  const ChannelVector m = channel_vector(mean), r = channel_vector(rstd);
  return normalise_with(
      x, in, weight, bias, e, save_mask, [&](int64_t c) { return get(m, c); },
      [&](int64_t c) { return get(r, c); });
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  check_input("batch_norm_stats", "x", x);
  const Input in = resolve(x);
  const auto options = x.options().dtype(at::kDouble);
  Tensor mean = at::zeros({x.size(1)}, options), var = at::zeros({x.size(1)}, options);
  if (x.numel() == 0) return {mean, var};
  double *mean_of = mean.data_ptr<double>(), *var_of = var.data_ptr<double>();
  ForwardParams p;
  p.shape = as_channels_first(in.shape);
  p.x = in.tensor.const_data_ptr();
  const auto moments = kernels().moments[static_cast<int>(in.dtype)];
  two_passes<Moments, ChannelMoments>(
      p.shape, cache_block_channels(p.shape, x.element_size(), false, at::get_num_threads()),
      [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
        moments(p, span, c0, c1, out);
      },
      [&](int64_t c, const ChannelMoments& total) {
        const auto [batch_mean, batch_var] = total.result();
        mean_of[c] = batch_mean;
        var_of[c] = batch_var;
      },
      [](const Span&, int64_t, int64_t) {}, false);
  return {mean, var};
}

std::tuple<Tensor, Tensor> merge_stats(const Tensor& mean, const Tensor& var, const Tensor& count,
                                       const OptionalTensor& running_mean,
                                       const OptionalTensor& running_var,
                                       const OptionalTensor& num_batches_tracked,
                                       std::optional<double> momentum, double eps,
                                       at::ScalarType dtype) {
  const char* op = "batch_norm_merge_stats";
  check_merge(op, mean, var, count);
  const double total = count.sum().item<double>();
  TORCH_CHECK_VALUE(total > 1, op, ": expected more than 1 value per channel, but got ", total);
  // The running statistics are checked as those of a batch of this many values per channel.
  const Tensor like = at::empty({2, mean.size(1)}, mean.options().dtype(dtype));
  const ForwardArguments arguments{
      like,        std::nullopt,        std::nullopt,      running_mean,
      running_var, num_batches_tracked, /*training=*/true, momentum,
      eps};
  check_forward(arguments);
  const RunningStatistics running(arguments, static_cast<int64_t>(total));
  Tensor merged_mean = statistic_like(like), merged_rstd = statistic_like(like);
  const auto means = mean.accessor<double, 2>(), vars = var.accessor<double, 2>();
  const auto counts = count.accessor<double, 1>();
  with_accumulator(dtype_of(like), [&](auto zero) {
    using A = decltype(zero);
    for (int64_t c = 0; c < mean.size(1); ++c) {
      ChannelMoments moments;
      for (int64_t w = 0; w < mean.size(0); ++w) {
        if (counts[w] > 0) moments.add({means[w][c], 0, vars[w][c] * counts[w]}, counts[w]);
      }
      const auto [all_mean, all_var] = moments.result();
      merged_mean.data_ptr<A>()[c] = static_cast<A>(all_mean);
      merged_rstd.data_ptr<A>()[c] = static_cast<A>(rstd_of<A>(all_var, eps));
      running.update(c, all_mean, all_var);
    }
  });
  running.count_batch();
  return {merged_mean, merged_rstd};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, CPU, m) {
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  m.impl("batch_norm_stats", stats);
  m.impl("batch_norm_merge_stats", merge_stats);
  m.impl("batch_norm_apply", apply);
}

}  // namespace cpu
}  // namespace bnorm_ext
