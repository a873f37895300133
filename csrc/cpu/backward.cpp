// The backward operators on CPU tensors: checks, allocation, per-channel coefficients, and which
// kernels to run (drive.h runs them, backward_kernels.h is what they do).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "channel.h"
#include "drive.h"

namespace bnorm_ext {
namespace cpu {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Everything backward: the sums, what follows from them, dx and dresidual. finish(c, sum_dy,
// sum_dy_xhat) receives the sums rounded to the accumulation type. mean_dy and mean_dy_xhat, where
// given, are used in place of this tensor's own.
struct Backward {
  const char* op;
  const Tensor& dy;
  const Tensor& x;
  const OptionalTensor& residual;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const Tensor& mean;
  const Tensor& rstd;
  const OptionalTensor& mask;
  std::string_view act;
  double slope;
  bool training = true;
  bool wants_sums = false;
  bool wants_dx = false;
  bool wants_dresidual = false;
  const Tensor* mean_dy = nullptr;
  const Tensor* mean_dy_xhat = nullptr;

  // dx and dresidual.
  template <typename Finish>
  std::tuple<Tensor, Tensor> run(Finish finish) const {
    const Input in = resolve(x);
    const Epilogue e = backward_epilogue(op, in, x, act, slope, residual, mask,
                                         MaskRows(as_channels_first(in.shape)).bytes());
    const Tensor g = in_layout_of(dy, in);
    Tensor dx, dresidual;
    if (wants_dx) dx = in_huge_pages(gradient_like(x, in));
    if (wants_dresidual) dresidual = in_huge_pages(gradient_like(x, in));
    if (x.numel() == 0) return {dx, dresidual};  // the callers' sums are 0 then
    const ChannelVector w = channel_vector(weight), b = channel_vector(bias);
    const double count = static_cast<double>(in.shape.count());
    const bool own_means = training && wants_dx && mean_dy == nullptr;
    const bool writes = wants_dx || wants_dresidual;
    with_accumulator(in.dtype, [&](auto zero) {
      using A = decltype(zero);
      const int64_t C = in.shape.C;
      Coefficients<A> coefficients(4, C);
      A *k1 = coefficients[0], *k2 = coefficients[1];
      A *scale = coefficients[2], *shift = coefficients[3];
      const A* rstd_of_c = rstd.const_data_ptr<A>();
      BackwardParams p;
      p.shape = as_channels_first(in.shape);
      p.dtype = in.dtype;
      p.dy = g.const_data_ptr();
      p.x = in.tensor.const_data_ptr();
      p.dx = wants_dx ? dx.data_ptr() : nullptr;
      p.dresidual = wants_dresidual ? dresidual.data_ptr() : nullptr;
      p.mean = mean.const_data_ptr();
      p.rstd = rstd_of_c;
      p.mean_dy = training ? k1 : nullptr;
      p.mean_dy_xhat = k2;
      p.scale = scale;
      p.act = e.act;
      p.slope = e.slope;
      if (e.act != Activation::Identity) {
        p.shift = shift;
        p.mask = e.mask.defined() ? e.mask.const_data_ptr<uint8_t>() : nullptr;
        p.residual = e.residual.defined() ? e.residual.const_data_ptr() : nullptr;
        for (int64_t c = 0; c < C; ++c) {
          scale[c] = static_cast<A>(get_or(w, c, 1)) * rstd_of_c[c];
          shift[c] = static_cast<A>(get_or(b, c, 0));
        }
      }
      // What is streamed must be aligned alike.
      p.stream =
          streams(wants_dx ? dx : dresidual,
                  2 + (p.residual != nullptr) + wants_dx + wants_dresidual) &&
          (!wants_dx || !wants_dresidual ||
           reinterpret_cast<uintptr_t>(p.dx) % 64 == reinterpret_cast<uintptr_t>(p.dresidual) % 64);
      const auto set_coefficients = [&](int64_t c, double dy_mean, double dy_xhat_mean) {
        k1[c] = static_cast<A>(dy_mean);
        k2[c] = static_cast<A>(dy_xhat_mean);
        scale[c] = static_cast<A>(get_or(w, c, 1)) * rstd_of_c[c];
      };
      const auto sums = kernels().sums[static_cast<int>(in.dtype)];
      const auto write = kernels().dx[static_cast<int>(in.dtype)];
      const auto second = [&](const Span& span, int64_t c0, int64_t c1) { write(p, span, c0, c1); };
      if (!wants_sums && !own_means) {
        for (int64_t c = 0; c < C; ++c) {
          set_coefficients(c, mean_dy ? mean_dy->const_data_ptr<A>()[c] : A{0},
                           mean_dy_xhat ? mean_dy_xhat->const_data_ptr<A>()[c] : A{0});
        }
        if (writes) one_pass(p.shape, second);
        return;
      }
      const int64_t slab = slab_channels(p.shape, 2 * x.element_size(), p.stream);
      p.ahead = slab * p.shape.S;
      two_passes<Sums, ChannelSums>(
          p.shape, slab,
          [&](const Span& span, int64_t c0, int64_t c1, Sums* out) { sums(p, span, c0, c1, out); },
          [&](int64_t c, const ChannelSums& total) {
            const A dy_sum = static_cast<A>(total.dy), dy_xhat_sum = static_cast<A>(total.dy_xhat);
            set_coefficients(c, own_means ? dy_sum / count : 0,
                             own_means ? dy_xhat_sum / count : 0);
            finish(c, dy_sum, dy_xhat_sum);
          },
          second, writes);
    });
    return {dx, dresidual};
  }

  // And the gradients of the parameters, where output_mask asks for them.
  Gradients gradients(std::array<bool, 4> output_mask) {
    wants_dx = output_mask[0];
    wants_dresidual = output_mask[1];
    wants_sums = output_mask[2] || output_mask[3];
    Tensor dweight, dbias;
    if (output_mask[2]) dweight = parameter_gradient_like(weight, x);
    if (output_mask[3]) dbias = parameter_gradient_like(bias, x);
    const ChannelVector dw = channel_vector(dweight), db = channel_vector(dbias);
    auto [dx, dresidual] = run([&](int64_t c, double sum_dy, double sum_dy_xhat) {
      if (db.data != nullptr) set(db, c, sum_dy);
      if (dw.data != nullptr) set(dw, c, sum_dy_xhat);
    });
    return {dx, dresidual, dweight, dbias};
  }
};

Gradients backward(const Tensor& dy, const Tensor& given_x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor& mask, std::string_view act,
                   double negative_slope, std::array<bool, 4> output_mask, bool any_layout) {
  const Tensor x = any_layout ? channels_last_as(dy, given_x, mask) : given_x;
  const char* op = "batch_norm_backward";
  check_backward({op, dy, x, weight, bias}, mean, rstd);
  Backward b{op, dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope};
  return b.gradients(output_mask);
}

Gradients inference_backward(const Tensor& dy, const Tensor& given_x,
                             const OptionalTensor& residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& running_mean,
                             const Tensor& running_var, double eps, const OptionalTensor& mask,
                             std::string_view act, double negative_slope,
                             std::array<bool, 4> output_mask, bool any_layout) {
  const Tensor x = any_layout ? channels_last_as(dy, given_x, mask) : given_x;
  const char* op = "batch_norm_inference_backward";
  check_input(op, "x", x);
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  check_gradient({op, dy, x, weight, bias});
  const Tensor mean = running_mean.to(accumulation_type(x.scalar_type())).contiguous();
  const Tensor rstd = statistic_like(x);
  if (x.numel() != 0) {
    const ChannelVector var = channel_vector(running_var), r = channel_vector(rstd);
    for (int64_t c = 0; c < x.size(1); ++c) set(r, c, 1.0 / std::sqrt(get(var, c) + eps));
  }
  Backward b{op, dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope};
  b.training = false;
  return b.gradients(output_mask);
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor& mask, std::string_view act,
                                           double negative_slope) {
  const char* op = "batch_norm_backward_reduce";
  check_backward({op, dy, x, weight, bias}, mean, rstd);
  Tensor sum_dy = statistic_like(x).zero_(), sum_dy_xhat = statistic_like(x).zero_();
  const ChannelVector s1 = channel_vector(sum_dy), s2 = channel_vector(sum_dy_xhat);
  Backward b{op, dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope};
  b.wants_sums = true;
  b.run([&](int64_t c, double dy_sum, double dy_xhat_sum) {
    set(s1, c, dy_sum);
    set(s2, c, dy_xhat_sum);
  });
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dy, const Tensor& x,
                                          const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& mean, const Tensor& rstd,
                                          const OptionalTensor& mask, const Tensor& mean_dy,
                                          const Tensor& mean_dy_xhat, std::string_view act,
                                          double negative_slope) {
  const char* op = "batch_norm_backward_apply";
  check_backward({op, dy, x, weight, bias}, mean, rstd);
  check_statistic(op, "mean_dy", mean_dy, x);
  check_statistic(op, "mean_dy_xhat", mean_dy_xhat, x);
  Backward b{op, dy, x, residual, weight, bias, mean, rstd, mask, act, negative_slope};
  b.wants_dx = true;
  b.wants_dresidual = given(residual);
  b.mean_dy = &mean_dy;
  b.mean_dy_xhat = &mean_dy_xhat;
  return b.run([](int64_t, double, double) {});
}

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, CPU, m) {
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
  m.impl("batch_norm_backward_reduce", backward_reduce);
  m.impl("batch_norm_backward_apply", backward_apply);
}

}  // namespace cpu
}  // namespace bnorm_ext
