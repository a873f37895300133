// The operators on CPU tensors: checks, allocation, per-channel coefficients, and which kernels to
// run (drive.h runs them, kernels_impl.h is what they do).
#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "drive.h"

namespace bnorm_ext {
namespace cpu {
namespace {

using at::Tensor;

double get(const ChannelVector& v, int64_t c) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      return static_cast<const float*>(v.data)[i];
    case DType::Double:
      return static_cast<const double*>(v.data)[i];
    case DType::Half:
      return static_cast<const c10::Half*>(v.data)[i];
    default:
      return static_cast<const c10::BFloat16*>(v.data)[i];
  }
}

void set(const ChannelVector& v, int64_t c, double value) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      break;
    case DType::Double:
      static_cast<double*>(v.data)[i] = value;
      break;
    case DType::Half:
      static_cast<c10::Half*>(v.data)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<c10::BFloat16*>(v.data)[i] = static_cast<float>(value);
  }
}

double get_or(const ChannelVector& v, int64_t c, double otherwise) {
  return v.data == nullptr ? otherwise : get(v, c);
}

// Some [C] arrays of the accumulation type, written per channel by whichever thread finishes it. On
// the stack for usual numbers of channels.
template <typename A>
class Coefficients {
 public:
  Coefficients(int64_t arrays, int64_t C) : C_(C), data_(stack_) {
    if (arrays * C > kOnStack) {
      heap_.resize(static_cast<size_t>(arrays * C));
      data_ = heap_.data();
    }
  }
  A* operator[](int64_t i) { return data_ + i * C_; }

 private:
  static constexpr int64_t kOnStack = 3 * 512;
  int64_t C_;
  A stack_[kOnStack];
  std::vector<A> heap_;
  A* data_;
};

// Moves the running statistics towards this batch. In double, whatever the buffers are.
class RunningStatistics {
 public:
  RunningStatistics(const ForwardArguments& a, int64_t count) : count_(static_cast<double>(count)) {
    update_.mean = channel_vector(a.running_mean);
    update_.var = channel_vector(a.running_var);
    if (given(a.num_batches_tracked)) {
      update_.num_batches_tracked = a.num_batches_tracked->data_ptr<int64_t>();
    }
    if (a.momentum) {
      update_.momentum = *a.momentum;
    } else if (update_.num_batches_tracked != nullptr) {
      update_.momentum = 1.0 / static_cast<double>(*update_.num_batches_tracked + 1);
    }
  }

  void update(int64_t c, double mean, double var) const {
    if (update_.mean.data == nullptr) return;
    const double m = update_.momentum;
    set(update_.mean, c, m * mean + (1 - m) * get(update_.mean, c));
    const double unbiased = var * (count_ / (count_ - 1));
    set(update_.var, c, m * unbiased + (1 - m) * get(update_.var, c));
  }

  void count_batch() const {
    if (update_.num_batches_tracked != nullptr) ++*update_.num_batches_tracked;
  }

 private:
  RunningUpdate update_;
  double count_;
};

template <typename F>
auto with_accumulator(DType dtype, F f) {
  return dtype == DType::Double ? f(double{}) : f(float{});
}

Tensor statistic_like(const Tensor& x) {
  return at::empty({x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
}

Tensor no_mask(const Tensor& x) {
  return at::empty({0}, x.options().dtype(at::kByte));
}

template <typename A>
double rstd_of(double var, double eps) {
  return static_cast<A>(1.0 / std::sqrt(var + eps));
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
  const Input in = resolve(x);
  Tensor y = at::empty_like(in.tensor, in.format);
  Tensor mean = statistic_like(x), rstd = statistic_like(x);
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    if (given(num_batches_tracked)) num_batches_tracked->add_(1);
    return {y, mean, rstd, no_mask(x)};
  }
  const RunningStatistics running(arguments, in.shape.count());
  const ChannelVector w = channel_vector(weight), b = channel_vector(bias);
  with_accumulator(in.dtype, [&](auto zero) {
    using A = decltype(zero);
    Coefficients<A> coefficients(2, in.shape.C);
    A *scale = coefficients[0], *shift = coefficients[1];
    A *mean_of = mean.data_ptr<A>(), *rstd_of_c = rstd.data_ptr<A>();
    const ForwardParams p{in.shape,     in.dtype,  in.tensor.const_data_ptr(),
                          y.data_ptr(), mean_of,   scale,
                          shift,        streams(y)};
    const auto moments = kernels().moments[static_cast<int>(in.dtype)];
    const auto apply = kernels().apply[static_cast<int>(in.dtype)];
    two_passes<Moments, ChannelMoments>(
        in.shape,
        [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
          moments(p, span, c0, c1, out);
        },
        [&](int64_t c, const ChannelMoments& total) {
          const double var = total.var();
          mean_of[c] = static_cast<A>(total.mean());
          rstd_of_c[c] = static_cast<A>(rstd_of<A>(var, eps));
          scale[c] = static_cast<A>(get_or(w, c, 1)) * rstd_of_c[c];
          shift[c] = static_cast<A>(get_or(b, c, 0));
          running.update(c, total.mean(), var);
        },
        [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); }, true);
  });
  running.count_batch();
  return {y, mean, rstd, no_mask(x)};
}

// y from statistics that are known, given per channel by mean_of(c) and rstd_of(c).
template <typename MeanOf, typename RstdOf>
Tensor normalise_with(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      MeanOf mean_of, RstdOf rstd_of) {
  const Input in = resolve(x);
  Tensor y = at::empty_like(in.tensor, in.format);
  if (x.numel() == 0) return y;
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
    const ForwardParams p{in.shape,     in.dtype,  in.tensor.const_data_ptr(),
                          y.data_ptr(), mean,      scale,
                          shift,        streams(y)};
    const auto apply = kernels().apply[static_cast<int>(in.dtype)];
    one_pass(in.shape, [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); });
  });
  return y;
}

std::tuple<Tensor, Tensor> inference(const Tensor& x, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var,
                                     double eps, std::string_view act, double) {
  check_activation(act, residual);
  check_forward(
      {x, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false, 0.0, eps});
  const ChannelVector mean = channel_vector(running_mean), var = channel_vector(running_var);
  const bool is_double = x.scalar_type() == at::kDouble;
  Tensor y = normalise_with(
      x, weight, bias, [&](int64_t c) { return get(mean, c); },
      [&](int64_t c) {
        return is_double ? rstd_of<double>(get(var, c), eps) : rstd_of<float>(get(var, c), eps);
      });
  return {y, no_mask(x)};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& mean, const Tensor& rstd, std::string_view act,
                                 double) {
  check_activation(act, residual);
  check_backward({"batch_norm_apply", x, x, weight, bias, mean, rstd});
  const ChannelVector m = channel_vector(mean), r = channel_vector(rstd);
  Tensor y = normalise_with(
      x, weight, bias, [&](int64_t c) { return get(m, c); }, [&](int64_t c) { return get(r, c); });
  return {y, no_mask(x)};
}

std::tuple<Tensor, Tensor> stats(const Tensor& x) {
  check_input("batch_norm_stats", "x", x);
  const Input in = resolve(x);
  const auto options = x.options().dtype(at::kDouble);
  Tensor mean = at::zeros({x.size(1)}, options), var = at::zeros({x.size(1)}, options);
  if (x.numel() == 0) return {mean, var};
  double *mean_of = mean.data_ptr<double>(), *var_of = var.data_ptr<double>();
  ForwardParams p;
  p.shape = in.shape;
  p.x = in.tensor.const_data_ptr();
  const auto moments = kernels().moments[static_cast<int>(in.dtype)];
  two_passes<Moments, ChannelMoments>(
      in.shape,
      [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
        moments(p, span, c0, c1, out);
      },
      [&](int64_t c, const ChannelMoments& total) {
        mean_of[c] = total.mean();
        var_of[c] = total.var();
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
  TORCH_CHECK(mean.dim() == 2 && mean.sizes() == var.sizes() && count.dim() == 1 &&
                  count.size(0) == mean.size(0) && mean.scalar_type() == at::kDouble &&
                  var.scalar_type() == at::kDouble && count.scalar_type() == at::kDouble,
              op, ": mean and var must be (W, C) and count (W,), all in double, but got shapes ",
              mean.sizes(), ", ", var.sizes(), ", ", count.sizes(), " and dtypes ",
              mean.scalar_type(), ", ", var.scalar_type(), ", ", count.scalar_type());
  const Tensor total = count.sum();
  // The running statistics are checked as those of a batch of this many values per channel.
  const Tensor like = at::empty({2, mean.size(1)}, mean.options().dtype(dtype));
  const ForwardArguments arguments{
      like,        std::nullopt,        std::nullopt,      running_mean,
      running_var, num_batches_tracked, /*training=*/true, momentum,
      eps};
  check_forward(arguments);
  const RunningStatistics running(arguments, static_cast<int64_t>(total.item<double>()));
  Tensor merged_mean = statistic_like(like), merged_rstd = statistic_like(like);
  const auto means = mean.accessor<double, 2>(), vars = var.accessor<double, 2>();
  const auto counts = count.accessor<double, 1>();
  with_accumulator(dtype_of(like), [&](auto zero) {
    using A = decltype(zero);
    for (int64_t c = 0; c < mean.size(1); ++c) {
      ChannelMoments moments;
      for (int64_t w = 0; w < mean.size(0); ++w) {
        if (counts[w] > 0) moments.add({means[w][c], vars[w][c] * counts[w]}, counts[w]);
      }
      merged_mean.data_ptr<A>()[c] = static_cast<A>(moments.mean());
      merged_rstd.data_ptr<A>()[c] = static_cast<A>(rstd_of<A>(moments.var(), eps));
      running.update(c, moments.mean(), moments.var());
    }
  });
  running.count_batch();
  return {merged_mean, merged_rstd};
}

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
    if (wants_dx) dx = at::empty_like(in.tensor, in.format);
    if (x.numel() == 0) {
      for (int64_t c = 0; c < x.size(1); ++c) finish(c, 0, 0);
      return dx;
    }
    const ChannelVector w = channel_vector(weight);
    const double count = static_cast<double>(in.shape.count());
    const bool own_means = training && mean_dy == nullptr;
    with_accumulator(in.dtype, [&](auto zero) {
      using A = decltype(zero);
      const int64_t C = in.shape.C;
      Coefficients<A> coefficients(3, C);
      A *k1 = coefficients[0], *k2 = coefficients[1], *scale = coefficients[2];
      const A* rstd_of_c = rstd.const_data_ptr<A>();
      const BackwardParams p{in.shape,
                             in.dtype,
                             g.const_data_ptr(),
                             in.tensor.const_data_ptr(),
                             wants_dx ? dx.data_ptr() : nullptr,
                             mean.const_data_ptr(),
                             rstd_of_c,
                             k1,
                             k2,
                             scale,
                             streams(dx)};
      const auto set_coefficients = [&](int64_t c, A dy_mean, A dy_xhat_mean) {
        k1[c] = dy_mean;
        k2[c] = dy_xhat_mean;
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
        if (wants_dx) one_pass(in.shape, second);
        return;
      }
      two_passes<Sums, ChannelSums>(
          in.shape,
          [&](const Span& span, int64_t c0, int64_t c1, Sums* out) { sums(p, span, c0, c1, out); },
          [&](int64_t c, const ChannelSums& total) {
            const A dy_sum = static_cast<A>(total.dy), dy_xhat_sum = static_cast<A>(total.dy_xhat);
            set_coefficients(c, own_means ? static_cast<A>(dy_sum / count) : A{0},
                             own_means ? static_cast<A>(dy_xhat_sum / count) : A{0});
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
  const auto like = [&](const OptionalTensor& t) {
    return t ? at::empty_like(*t, at::MemoryFormat::Contiguous) : statistic_like(x);
  };
  Tensor dweight, dbias;
  if (output_mask[2]) dweight = like(weight);
  if (output_mask[3]) dbias = like(bias);
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
  check_backward({"batch_norm_backward", dy, x, weight, bias, mean, rstd});
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
  const Tensor mean = running_mean.to(accumulation_type(x.scalar_type())).contiguous();
  const Tensor rstd = statistic_like(x);
  if (x.numel() != 0) {
    const ChannelVector var = channel_vector(running_var), r = channel_vector(rstd);
    for (int64_t c = 0; c < x.size(1); ++c) set(r, c, 1.0 / std::sqrt(get(var, c) + eps));
    check_backward({"batch_norm_inference_backward", dy, x, weight, bias, mean, rstd});
  }
  return gradients(dy, x, weight, bias, mean, rstd, /*training=*/false, output_mask);
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& residual,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& rstd,
                                           const OptionalTensor&, std::string_view act, double) {
  check_activation(act, residual);
  check_backward({"batch_norm_backward_reduce", dy, x, weight, bias, mean, rstd});
  Tensor sum_dy = statistic_like(x), sum_dy_xhat = statistic_like(x);
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
  check_backward({op, dy, x, weight, bias, mean, rstd});
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
  m.impl("batch_norm_training", training);
  m.impl("batch_norm_inference", inference);
  m.impl("batch_norm_backward", backward);
  m.impl("batch_norm_inference_backward", inference_backward);
  m.impl("batch_norm_stats", stats);
  m.impl("batch_norm_merge_stats", merge_stats);
  m.impl("batch_norm_apply", apply);
  m.impl("batch_norm_backward_reduce", backward_reduce);
  m.impl("batch_norm_backward_apply", backward_apply);
}

}  // namespace cpu
}  // namespace bnorm_ext
