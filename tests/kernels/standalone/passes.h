// What csrc/cpu/backend.cpp does for a training step, an evaluation and two backward passes.
#pragma once

#include <cpu/parallel.h>
#include <cpu/totals.h>

#include <cmath>
#include <vector>

#include "elements.h"

using namespace bnorm_ext;
using namespace bnorm_ext::cpu;

namespace {

constexpr double kEps = 1e-5, kSlope = 0.1;

enum class Data {
  Usual,
  Outlier,  // where sums begin: their anchor is far from the mean, and they are taken again
  Huge,     // squares exceed the range of float, and sums are taken again in double
};

struct Case {
  const char* name;
  Shape shape;
  Activation act;
  bool residual;
  Data data = Data::Usual;
  bool nontemporal = false;  // also where the tensor is too small for it

  bool masked() const { return residual && is_piecewise(act); }
};

// The arguments of a call.
struct Inputs {
  Inputs(const Case& c, DType dtype)
      : x(dtype, c.shape.numel()),
        dy(dtype, c.shape.numel()),
        residual(dtype, c.shape.numel()),
        weight(c.shape.C),
        bias(c.shape.C) {
    fill(c, x, 1);
    fill(c, dy, 2);
    fill(c, residual, 3);
    for (int64_t i = 0; i < c.shape.C; ++i) {
      weight[i] = (i % 5 == 4 ? -1 : 1) * (0.5 + 0.25 * static_cast<double>(i % 7));
      bias[i] = 0.25 * static_cast<double>(i % 3 - 1);
      if (c.act == Activation::Relu6 && i % 2 == 1) bias[i] += 5;  // on both sides of 6
    }
  }
  Elements x, dy, residual;
  std::vector<double> weight, bias;  // float holds them exactly

 private:
  static void fill(const Case& c, Elements& values, unsigned seed) {
    const int64_t C = c.shape.C, S = c.shape.S;
    unsigned state = seed * 2654435761u + 1;
    for (int64_t i = 0; i < c.shape.numel(); ++i) {
      state = state * 1664525u + 1013904223u;
      double value = static_cast<double>(state >> 8) / (1 << 23) - 0.7;
      if (seed == 1) {  // x
        if (i / S % C % 4 == 3) value += 50;
        if (c.data == Data::Outlier && i / (S * C) == 0 && i % S < 16) value += 30;
        if (c.data == Data::Huge) value *= 0x1p83;
      }
      values.set(i, value);
    }
  }
};

// The results of all passes.
struct Results {
  Results(const Case& c, DType dtype)
      : y(dtype, c.shape.numel()),
        evaluated(dtype, c.shape.numel()),
        dx(dtype, c.shape.numel()),
        dx_constant(dtype, c.shape.numel()),
        dresidual(dtype, c.shape.numel()),
        mask(static_cast<size_t>(MaskRows(c.shape).bytes())),
        mean(c.shape.C),
        var(c.shape.C),
        sum_g(c.shape.C),
        sum_g_xhat(c.shape.C) {}
  bool operator==(const Results& o) const {
    return y == o.y && evaluated == o.evaluated && dx == o.dx && dx_constant == o.dx_constant &&
           dresidual == o.dresidual && mask == o.mask && mean == o.mean && var == o.var &&
           sum_g == o.sum_g && sum_g_xhat == o.sum_g_xhat;
  }
  Elements y;            // of training
  Elements evaluated;    // the same with the statistics of training as known ones
  Elements dx;           // of training
  Elements dx_constant;  // of an evaluation
  Elements dresidual;
  Buffer mask;
  std::vector<double> mean, var, sum_g, sum_g_xhat;
};

// A: the accumulation type of dtype.
template <typename A>
void run(const Case& c, DType dtype, int threads, const Inputs& in, Results& out) {
  at::number_of_threads = threads;
  const Shape& s = c.shape;
  const int64_t C = s.C, bytes = static_cast<int64_t>(format_of(dtype).bytes);
  const int kernel = static_cast<int>(dtype);
  const double count = static_cast<double>(s.count());
  std::vector<A> mean(C), rest(C), rstd(C), scale(C), shift(C), g_mean(C), g_xhat_mean(C);

  ForwardParams f;
  f.shape = s;
  f.dtype = dtype;
  f.x = in.x.as();
  f.y = out.y.as();
  f.mean = mean.data();
  f.scale = scale.data();
  f.shift = shift.data();
  f.residual = c.residual ? in.residual.as() : nullptr;
  f.act = c.act;
  f.slope = kSlope;
  f.mask = c.masked() ? out.mask.as<uint8_t>() : nullptr;
  f.nontemporal = c.nontemporal || is_nontemporal(s, bytes, c.residual ? 3 : 2);
  int64_t block = cache_block_channels(s, bytes, f.nontemporal, threads, c.masked());
  f.prefetch_distance = prefetch_distance(s, block);
  const KernelTable& k = kernels();
  two_passes<Moments, ChannelMoments>(
      s, block, /*writes_mask=*/f.mask != nullptr,
      [&](const Span& span, int64_t c0, int64_t c1, Moments* m) {
        k.moments[kernel](f, span, c0, c1, m);
      },
      [&](int64_t i, const ChannelMoments& total) {
        const auto batch = total.result();
        const auto split = split_mean<A>(batch.anchor, batch.delta);
        mean[i] = split.mean;
        rest[i] = split.rest;
        out.mean[i] = batch.mean;
        out.var[i] = batch.var;
        rstd[i] = static_cast<A>(1 / std::sqrt(batch.var + kEps));
        scale[i] = static_cast<A>(in.weight[i]) * rstd[i];
        shift[i] = shift_of<A>(in.bias[i], split.rest, scale[i]);
      },
      [&](const Span& span, int64_t c0, int64_t c1) { k.apply[kernel](f, span, c0, c1); }, true);

  f.y = out.evaluated.as();
  f.mask = nullptr;
  one_pass(s, /*writes_mask=*/false,
           [&](const Span& span, int64_t c0, int64_t c1) { k.apply[kernel](f, span, c0, c1); });

  BackwardParams b;
  b.shape = s;
  b.dtype = dtype;
  b.dy = in.dy.as();
  b.x = in.x.as();
  b.dx = out.dx.as();
  b.dresidual = c.residual ? out.dresidual.as() : nullptr;
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.mean_dy = g_mean.data();
  b.mean_dy_xhat = g_xhat_mean.data();
  b.scale = scale.data();
  b.shift = c.act == Activation::Identity ? nullptr : shift.data();
  b.residual = c.residual && !c.masked() && b.shift != nullptr ? in.residual.as() : nullptr;
  b.act = c.act;
  b.slope = kSlope;
  b.mask = c.masked() ? out.mask.as<uint8_t>() : nullptr;
  b.nontemporal = c.nontemporal || is_nontemporal(s, bytes, c.residual ? 4 : 3);
  block = cache_block_channels(s, 2 * bytes, b.nontemporal, threads);
  b.prefetch_distance = prefetch_distance(s, block);
  two_passes<Sums, ChannelSums>(
      s, block, /*writes_mask=*/false,
      [&](const Span& span, int64_t c0, int64_t c1, Sums* p) {
        k.sums[kernel](b, span, c0, c1, p);
      },
      [&](int64_t i, const ChannelSums& total) {
        const double rest_xhat = rest[i] * static_cast<double>(rstd[i]);
        const Sums merged = total.result();
        out.sum_g[i] = static_cast<A>(merged.dy);
        out.sum_g_xhat[i] = static_cast<A>(less_rest(merged.dy_xhat, rest_xhat, merged.dy));
        g_xhat_mean[i] = static_cast<A>(out.sum_g_xhat[i] / count);
        g_mean[i] = static_cast<A>(
            less_rest(static_cast<A>(out.sum_g[i] / count), rest[i], rstd[i] * g_xhat_mean[i]));
      },
      [&](const Span& span, int64_t c0, int64_t c1) { k.dx[kernel](b, span, c0, c1); }, true);

  b.dx = out.dx_constant.as();
  b.dresidual = nullptr;
  b.mean_dy = b.mean_dy_xhat = nullptr;
  one_pass(s, /*writes_mask=*/false,
           [&](const Span& span, int64_t c0, int64_t c1) { k.dx[kernel](b, span, c0, c1); });
}

Results results_of(const Case& c, DType dtype, int threads, const Inputs& in) {
  Results out(c, dtype);
  dtype == DType::Double ? run<double>(c, dtype, threads, in, out)
                         : run<float>(c, dtype, threads, in, out);
  return out;
}

}  // namespace
