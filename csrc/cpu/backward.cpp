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

// Everything backward: the sums, what follows from them, and dx. finish(c, sum_dy, sum_dy_xhat)
// receives the sums rounded to the accumulation type. mean_dy and mean_dy_xhat, where given, are
// used in place of this tensor's own.
struct Backward {
  const Tensor& dy;
  const Tensor& x;
  const OptionalTensor& weight;
  const Tensor& mean;
  const Tensor& rstd;
  bool training;
  bool wants_sums;
  bool wants_dx;
  const Tensor* mean_dy = nullptr;
  const Tensor* mean_dy_xhat = nullptr;

  template <typename Finish>
  Tensor run(Finish finish) const {
    const Input in = resolve(x);
    const Tensor g = in_layout_of(dy, in);
    Tensor dx;
    if (wants_dx) dx = in_huge_pages(gradient_like(x, in));
    if (x.numel() == 0) return dx;  // the callers' sums are 0 then
    const ChannelVector w = channel_vector(weight);
    const double count = static_cast<double>(in.shape.count());
    const bool own_means = training && mean_dy == nullptr;
    with_accumulator(in.dtype, [&](auto zero) {
      using A = decltype(zero);
      const int64_t C = in.shape.C;
      Coefficients<A> coefficients(3, C);
      A *k1 = coefficients[0], *k2 = coefficients[1], *scale = coefficients[2];
      const A* rstd_of_c = rstd.const_data_ptr<A>();
      BackwardParams p;
      p.shape = as_channels_first(in.shape);
      p.dtype = in.dtype;
      p.dy = g.const_data_ptr();
      p.x = in.tensor.const_data_ptr();
      p.dx = wants_dx ? dx.data_ptr() : nullptr;
      p.mean = mean.const_data_ptr();
      p.rstd = rstd_of_c;
      p.mean_dy = training ? k1 : nullptr;
      p.mean_dy_xhat = k2;
      p.scale = scale;
      p.stream = streams(dx);
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
        if (wants_dx) one_pass(p.shape, second);
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
          second, wants_dx);
    });
    return dx;
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                    bool training, std::array<bool, 4> output_mask) {
  Tensor dweight, dbias;
  if (output_mask[2]) dweight = parameter_gradient_like(weight, x);
  if (output_mask[3]) dbias = parameter_gradient_like(bias, x);
  const ChannelVector dw = channel_vector(dweight), db = channel_vector(dbias);
  const Backward backward{
      dy, x, weight, mean, rstd, training, output_mask[2] || output_mask[3], output_mask[0]};
  Tensor dx = backward.run([&](int64_t c, double sum_dy, double sum_dy_xhat) {
    if (db.data != nullptr) set(db, c, sum_dy);
    if (dw.data != nullptr) set(dw, c, sum_dy_xhat);
  });
  return {dx, Tensor(), dweight, dbias};
}

Gradients backward(const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                   const Tensor& rstd, const OptionalTensor&, std::string_view act, double,
                   std::array<bool, 4> output_mask) {
  check_activation(act, residual);
  check_backward({"batch_norm_backward", dy, x, weight, bias}, mean, rstd);
  return gradients(dy, x, weight, bias, mean, rstd, /*training=*/true, output_mask);
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
  check_gradient({"batch_norm_inference_backward", dy, x, weight, bias});
  const Tensor mean = running_mean.to(accumulation_type(x.scalar_type())).contiguous();
  const Tensor rstd = statistic_like(x);
  if (x.numel() != 0) {
    const ChannelVector var = channel_vector(running_var), r = channel_vector(rstd);
    for (int64_t c = 0; c < x.size(1); ++c) set(r, c, 1.0 / std::sqrt(get(var, c) + eps));
  }
  return gradients(dy, x, weight, bias, mean, rstd, /*training=*/false, output_mask);
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor&, std::string_view act, double) {
  check_activation(act, residual);
  check_backward({"batch_norm_backward_reduce", dy, x, weight, bias}, mean, rstd);
  Tensor sum_dy = statistic_like(x).zero_(), sum_dy_xhat = statistic_like(x).zero_();
  const ChannelVector s1 = channel_vector(sum_dy), s2 = channel_vector(sum_dy_xhat);
  Backward{dy, x, weight, mean, rstd, /*training=*/true, /*wants_sums=*/true, /*wants_dx=*/false}
      .run([&](int64_t c, double dy_sum, double dy_xhat_sum) {
        set(s1, c, dy_sum);
        set(s2, c, dy_xhat_sum);
      });
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
  const Backward backward{dy,
                          x,
                          weight,
                          mean,
                          rstd,
                          /*training=*/true,
                          /*wants_sums=*/false,
                          /*wants_dx=*/true,
                          &mean_dy,
                          &mean_dy_xhat};
  return {backward.run([](int64_t, double, double) {}), Tensor()};
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
