// The CPU's functions of the table in backend.h: per-channel coefficients, and which kernels run
// (parallel.h runs them, forward_kernels.h and backward_kernels.h are what they do).
#include "../backend.h"

#include <cmath>
#include <cstring>

#include "channel.h"
#include "huge_pages.h"
#include "parallel.h"

namespace bnorm_ext {
namespace cpu {
namespace {

int64_t mask_bytes(const Input& in) {
  return MaskRows(as_channels_first(in.shape)).bytes();
}

// Everything but the coefficients.
ForwardParams forward_params(const ForwardCall& c) {
  advise_huge_pages(c.y);
  ForwardParams p;
  p.shape = as_channels_first(c.in.shape);
  p.dtype = c.in.dtype;
  p.x = c.in.tensor.const_data_ptr();
  p.y = c.y.data_ptr();
  p.residual = c.epilogue.residual.defined() ? c.epilogue.residual.const_data_ptr() : nullptr;
  p.act = c.epilogue.act;
  p.slope = c.epilogue.slope;
  if (c.mask.numel() > 0) {
    p.mask = c.mask.data_ptr<uint8_t>();
    // The kernels read these bytes, and do not write them.
    std::memset(p.mask + c.mask.numel() - kMaskSlack, 0, kMaskSlack);
  }
  p.nontemporal =
      is_nontemporal(p.shape, c.in.tensor.element_size(), p.residual != nullptr ? 3 : 2);
  return p;
}

void train(ForwardCall& c, double eps, const RunningUpdate& running, const Tensor& mean,
           const Tensor& rstd) {
  const RunningStatistics running_statistics(running, c.in.shape.count());
  with_accumulator(c.in.dtype, [&](auto zero) {
    using A = decltype(zero);
    Coefficients<A> coefficients(2, c.in.shape.C);
    A *scale = coefficients[0], *shift = coefficients[1];
    A *mean_of = mean.data_ptr<A>(), *rest_of = mean_of + c.in.shape.C;
    A* rstd_of_c = rstd.data_ptr<A>();
    ForwardParams p = forward_params(c);
    p.mean = mean_of;
    p.scale = scale;
    p.shift = shift;
    const int64_t block_channels =
        cache_block_channels(p.shape, c.in.tensor.element_size(), p.nontemporal,
                             at::get_num_threads(), /*writes_mask=*/p.mask != nullptr);
    p.prefetch_distance = prefetch_distance(p.shape, block_channels);
    const auto moments = kernels().moments[static_cast<int>(c.in.dtype)];
    const auto apply = kernels().apply[static_cast<int>(c.in.dtype)];
    two_passes<Moments, ChannelMoments>(
        p.shape, block_channels, /*writes_mask=*/p.mask != nullptr,
        [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
          moments(p, span, c0, c1, out);
        },
        [&](int64_t i, const ChannelMoments& total) {
          const auto batch = total.result();
          const auto split = split_mean<A>(batch.anchor, batch.delta);
          mean_of[i] = split.mean;
          rest_of[i] = split.rest;
          rstd_of_c[i] = static_cast<A>(rstd_of<A>(batch.var, eps));
          scale[i] = static_cast<A>(get_or(c.weight, i, 1)) * rstd_of_c[i];
          shift[i] = shift_of<A>(get_or(c.bias, i, 0), split.rest, scale[i]);
          running_statistics.update(i, batch.mean, batch.var);
        },
        [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); }, true);
  });
  running_statistics.count_batch();
}

template <typename A>
A known_rstd(const Statistics& s, int64_t c) {
  const double var = get(s.var, c);
  return static_cast<A>(s.is_rstd ? var : rstd_of<A>(var, s.eps));
}
template <typename A>
A known_rest(const Statistics& s, int64_t c) {
  return static_cast<A>(get_or(s.rest, c, 0));
}

void normalise(ForwardCall& c, const Statistics& statistics) {
  with_accumulator(c.in.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t C = c.in.shape.C;
    Coefficients<A> coefficients(3, C);
    A *mean = coefficients[0], *scale = coefficients[1], *shift = coefficients[2];
    for (int64_t i = 0; i < C; ++i) {
      mean[i] = static_cast<A>(get(statistics.mean, i));
      scale[i] = static_cast<A>(get_or(c.weight, i, 1)) * known_rstd<A>(statistics, i);
      shift[i] = shift_of(get_or(c.bias, i, 0), known_rest<A>(statistics, i), scale[i]);
    }
    ForwardParams p = forward_params(c);
    p.mean = mean;
    p.scale = scale;
    p.shift = shift;
    const auto apply = kernels().apply[static_cast<int>(c.in.dtype)];
    one_pass(p.shape, /*writes_mask=*/p.mask != nullptr,
             [&](const Span& span, int64_t c0, int64_t c1) { apply(p, span, c0, c1); });
  });
}

void statistics(Input& in, const Tensor& mean, const Tensor& var) {
  double *mean_of = mean.data_ptr<double>(), *var_of = var.data_ptr<double>();
  ForwardParams p;
  p.shape = as_channels_first(in.shape);
  p.x = in.tensor.const_data_ptr();
  const auto moments = kernels().moments[static_cast<int>(in.dtype)];
  two_passes<Moments, ChannelMoments>(
      p.shape,
      cache_block_channels(p.shape, in.tensor.element_size(), false, at::get_num_threads()),
      /*writes_mask=*/false,
      [&](const Span& span, int64_t c0, int64_t c1, Moments* out) {
        moments(p, span, c0, c1, out);
      },
      [&](int64_t c, const ChannelMoments& total) {
        const auto batch = total.result();
        mean_of[c] = batch.mean;
        var_of[c] = batch.var;
      },
      [](const Span&, int64_t, int64_t) {}, false);
}

void merge(const Tensor& mean, const Tensor& var, const Tensor& count, double eps,
           const RunningUpdate& running, const Tensor& merged_mean, const Tensor& merged_rstd) {
  const double values = count.sum().item<double>(), least = count.min().item<double>();
  TORCH_CHECK_VALUE(values > 1,
                    "batch_norm_merge_stats: expected more than 1 value per channel, but got ",
                    values);
  // Up to 2^53 a double counts one by one.
  TORCH_CHECK_VALUE(least >= 0 && values <= 0x1p53 && values == std::floor(values),
                    "batch_norm_merge_stats: expected counts that are not negative and whole, at "
                    "most 2^53 in all, but got ",
                    least >= 0 ? values : least);
  const RunningStatistics running_statistics(running, static_cast<int64_t>(values));
  const auto means = mean.accessor<double, 2>(), vars = var.accessor<double, 2>();
  const auto counts = count.accessor<double, 1>();
  with_accumulator(dtype_of(merged_mean), [&](auto zero) {
    using A = decltype(zero);
    for (int64_t c = 0; c < mean.size(1); ++c) {
      ChannelMoments moments;
      for (int64_t w = 0; w < mean.size(0); ++w) {
        if (counts[w] > 0) moments.add({means[w][c], 0, vars[w][c] * counts[w]}, counts[w]);
      }
      const auto all = moments.result();
      const auto split = split_mean<A>(all.anchor, all.delta);
      merged_mean.data_ptr<A>()[c] = split.mean;
      merged_mean.data_ptr<A>()[mean.size(1) + c] = split.rest;
      merged_rstd.data_ptr<A>()[c] = static_cast<A>(rstd_of<A>(all.var, eps));
      running_statistics.update(c, all.mean, all.var);
    }
  });
  running_statistics.count_batch();
}

// Mean and rstd in the accumulation type. Those of a training forward pass are used as they are.
template <typename A>
struct KnownStatistics {
  KnownStatistics(const Statistics& s, int64_t C)
      : converted(s.is_rstd ? 0 : 2, C),
        mean(s.is_rstd ? static_cast<const A*>(s.mean.data) : converted[0]),
        rstd(s.is_rstd ? static_cast<const A*>(s.var.data) : converted[1]) {
    if (s.is_rstd) return;
    for (int64_t c = 0; c < C; ++c) {
      converted[0][c] = static_cast<A>(get(s.mean, c));
      converted[1][c] = known_rstd<A>(s, c);
    }
  }

  Coefficients<A> converted;
  const A *mean, *rstd;  // [C]
};

// Everything but the statistics and the coefficients.
BackwardParams backward_params(const BackwardCall& c, const BackwardOutputs& out) {
  BackwardParams p;
  p.shape = as_channels_first(c.in.shape);
  p.dtype = c.in.dtype;
  p.dy = c.dy.const_data_ptr();
  p.x = c.in.tensor.const_data_ptr();
  const auto written = [](const Tensor& t) -> void* {
    if (!t.defined()) return nullptr;
    advise_huge_pages(t);
    return t.data_ptr();
  };
  p.dx = written(out.dx);
  p.dresidual = written(out.dresidual);
  p.act = c.epilogue.act;
  p.slope = c.epilogue.slope;
  if (p.act != Activation::Identity) {
    if (c.epilogue.mask.defined()) p.mask = c.epilogue.mask.const_data_ptr<uint8_t>();
    if (c.epilogue.residual.defined()) p.residual = c.epilogue.residual.const_data_ptr();
  }
  const bool two_outputs = p.dx != nullptr && p.dresidual != nullptr;
  const int64_t tensors =
      2 + (p.residual != nullptr) + (p.dx != nullptr) + (p.dresidual != nullptr);
  // Nontemporal stores are for outputs with the same alignment: both are written in one loop.
  p.nontemporal = (p.dx != nullptr || p.dresidual != nullptr) &&
                  is_nontemporal(p.shape, c.in.tensor.element_size(), tensors) &&
                  (!two_outputs || reinterpret_cast<uintptr_t>(p.dx) % 64 ==
                                       reinterpret_cast<uintptr_t>(p.dresidual) % 64);
  return p;
}

// mean_g, mean_g_xhat: [C], used in the place of this tensor's own means; or null.
void run_backward(const BackwardCall& c, bool constant_statistics, const BackwardOutputs& out,
                  const Tensor* mean_g, const Tensor* mean_g_xhat) {
  const bool wants_sums = out.sum_g.defined() || out.sum_g_xhat.defined();
  const bool own_means = !constant_statistics && out.dx.defined() && mean_g == nullptr;
  const bool writes = out.dx.defined() || out.dresidual.defined();
  const ChannelVector sum_g = channel_vector(out.sum_g);
  const ChannelVector sum_g_xhat = channel_vector(out.sum_g_xhat);
  const double count = static_cast<double>(c.in.shape.count());
  with_accumulator(c.in.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t C = c.in.shape.C;
    Coefficients<A> coefficients(4, C);
    A *k1 = coefficients[0], *k2 = coefficients[1];
    A *scale = coefficients[2], *shift = coefficients[3];
    BackwardParams p = backward_params(c, out);
    const KnownStatistics<A> known(c.statistics, C);
    const A* rstd = known.rstd;
    p.mean = known.mean;
    p.rstd = rstd;
    p.mean_dy = constant_statistics ? nullptr : k1;
    p.mean_dy_xhat = k2;
    p.scale = scale;
    if (p.act != Activation::Identity) {
      p.shift = shift;
      for (int64_t i = 0; i < C; ++i) {
        scale[i] = static_cast<A>(get_or(c.weight, i, 1)) * rstd[i];
        shift[i] = shift_of(get_or(c.bias, i, 0), known_rest<A>(c.statistics, i), scale[i]);
      }
    }
    const auto set_coefficients = [&](int64_t i, double g_mean, double g_xhat_mean) {
      // x - mean - rest in dx: what the rest gives goes into the constant term.
      const A rest = known_rest<A>(c.statistics, i), mean = static_cast<A>(g_mean);
      k2[i] = static_cast<A>(g_xhat_mean);
      k1[i] = static_cast<A>(less_rest(mean, rest, rstd[i] * k2[i]));
      scale[i] = static_cast<A>(get_or(c.weight, i, 1)) * rstd[i];
    };
    const auto sums = kernels().sums[static_cast<int>(c.in.dtype)];
    const auto write = kernels().dx[static_cast<int>(c.in.dtype)];
    const auto second = [&](const Span& span, int64_t c0, int64_t c1) { write(p, span, c0, c1); };
    if (!wants_sums && !own_means) {
      for (int64_t i = 0; i < C; ++i) {
        set_coefficients(i, mean_g ? mean_g->const_data_ptr<A>()[i] : A{0},
                         mean_g_xhat ? mean_g_xhat->const_data_ptr<A>()[i] : A{0});
      }
      if (writes) one_pass(p.shape, /*writes_mask=*/false, second);
      return;
    }
    const int64_t block_channels = cache_block_channels(p.shape, 2 * c.in.tensor.element_size(),
                                                        p.nontemporal, at::get_num_threads());
    p.prefetch_distance = prefetch_distance(p.shape, block_channels);
    two_passes<Sums, ChannelSums>(
        p.shape, block_channels, /*writes_mask=*/false,
        [&](const Span& span, int64_t c0, int64_t c1, Sums* partial) {
          sums(p, span, c0, c1, partial);
        },
        [&](int64_t i, const ChannelSums& total) {
          const double rest_xhat = known_rest<A>(c.statistics, i) * static_cast<double>(rstd[i]);
          const Sums merged = total.result();
          const A g = static_cast<A>(merged.dy),
                  g_xhat = static_cast<A>(less_rest(merged.dy_xhat, rest_xhat, merged.dy));
          set_coefficients(i, own_means ? g / count : 0, own_means ? g_xhat / count : 0);
          if (sum_g.data != nullptr) set(sum_g, i, g);
          if (sum_g_xhat.data != nullptr) set(sum_g_xhat, i, g_xhat);
        },
        second, writes);
  });
}

void backward(BackwardCall& c, bool constant_statistics, const BackwardOutputs& out) {
  run_backward(c, constant_statistics, out, nullptr, nullptr);
}

void backward_apply(BackwardCall& c, const Tensor& mean_g, const Tensor& mean_g_xhat,
                    const BackwardOutputs& out) {
  run_backward(c, /*constant_statistics=*/false, out, &mean_g, &mean_g_xhat);
}

}  // namespace

const Backend& backend() {
  static constexpr Backend table{mask_bytes, train,    normalise,     statistics,
                                 merge,      backward, backward_apply};
  return table;
}

}  // namespace cpu
}  // namespace bnorm_ext
