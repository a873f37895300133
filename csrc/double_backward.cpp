#include "double_backward.h"

#include <vector>

#include "operators.h"

namespace bnorm_ext {
namespace {

using at::Tensor;

void add(Tensor& sum, const Tensor& term) {
  sum = sum.defined() ? sum + term : term;
}

// x normalised, as a differentiable function of x: mean and rstd are made functions of x again,
// with the values they have, so that derivatives of any order are right.
struct Normalised {
  Normalised(const BackwardInputs& in, at::ScalarType type)
      : type(type), rank(in.x.dim()), C(in.x.sym_size(1)), train(in.train) {
    dims.push_back(0);
    for (int64_t d = 2; d < rank; ++d) dims.push_back(d);
    const Tensor x = in.x.to(type);
    const bool has_rest = in.mean.dim() == 2;
    Tensor mean = broadcast(has_rest ? in.mean.select(0, 0) : in.mean);
    rstd = broadcast(in.rstd);
    if (train) {
      const Tensor mean_of_x = average(x);
      mean = mean.detach() + (mean_of_x - mean_of_x.detach());
      const Tensor var_of_x = average((x - mean).square());
      rstd = (rstd.detach().pow(-2) + (var_of_x - var_of_x.detach())).rsqrt();
    }
    Tensor centred = x - mean;
    if (has_rest) centred = centred - broadcast(in.mean.select(0, 1)).detach();
    xhat = centred * rstd;
    scale = given(in.weight) ? broadcast(*in.weight) * rstd : rstd;
  }

  Tensor broadcast(const Tensor& t) const {
    std::vector<c10::SymInt> per_channel(static_cast<size_t>(rank), 1);
    per_channel[1] = C;
    return t.to(type).reshape_symint(per_channel);
  }
  Tensor average(const Tensor& t) const { return t.mean(dims, /*keepdim=*/true); }
  Tensor sum(const Tensor& t) const { return t.sum(dims); }
  // P(v) = v - mean(v) - xhat * mean(v * xhat), means over all but the channels; P(v) = v where the
  // statistics are constants. It is symmetric, and d xhat = rstd * P(d x).
  Tensor project(const Tensor& v) const {
    return train ? v - average(v) - xhat * average(v * xhat) : v;
  }

  at::ScalarType type;
  int64_t rank;
  c10::SymInt C;
  bool train;
  std::vector<int64_t> dims;
  Tensor xhat, rstd, scale;
};

// Gradients of (g, x, weight), where backward computed from g, the gradient of z,
//   dx = scale * P(g),   dweight = sum(g * xhat),   dbias = sum(g).
std::array<Tensor, 3> through_batch_norm(const BackwardCotangents& dd, const Tensor& g,
                                         const Normalised& n) {
  Tensor g_g, g_x, g_weight;
  const Tensor p_g = n.project(g);
  if (given(dd.dx)) {
    const Tensor a = dd.dx->to(n.type);
    add(g_g, n.scale * n.project(a));
    if (n.train) {
      const Tensor terms = n.xhat * n.average(a * p_g) + n.project(a) * n.average(g * n.xhat) +
                           p_g * n.average(a * n.xhat);
      add(g_x, -(n.scale * n.rstd) * terms);
    }
    g_weight = n.sum(a * n.rstd * p_g);
  }
  if (given(dd.dweight)) {
    const Tensor b = n.broadcast(*dd.dweight);
    add(g_g, b * n.xhat);
    add(g_x, b * n.rstd * p_g);
  }
  if (given(dd.dbias)) add(g_g, n.broadcast(*dd.dbias).expand_as(g));
  return {g_g, g_x, g_weight};
}

// act'(z) of a piecewise linear activation: constant almost everywhere, from the kernel itself so
// that it agrees at the kinks and reads the mask.
Tensor piecewise_slope(const BackwardInputs& in, at::ScalarType type) {
  at::NoGradGuard no_grad;
  const auto detached = [](const OptionalTensor& t) {
    return given(t) ? OptionalTensor(t->detach()) : std::nullopt;
  };
  // 1 where the gradient passes and 0 elsewhere, which any dtype holds exactly.
  const char* act = in.act == Activation::Relu6 ? "relu6" : "relu";
  const Tensor passes = std::get<1>(backward_op().call(
      at::ones_like(in.x), in.x.detach(), detached(residual_to_read(in.residual, in.mask)),
      detached(in.weight), detached(in.bias), std::nullopt, std::nullopt, in.mean, in.rstd,
      /*train=*/true, /*eps=*/0.0, in.mask, act, 0.0, {false, true, false, false},
      /*any_layout=*/false));
  if (in.act != Activation::LeakyRelu) return passes.to(type);
  // In double: two numbers would make a float tensor.
  const auto number = [&](double value) {
    return at::full({}, value, passes.options().dtype(at::kDouble));
  };
  return at::where(passes > 0, number(1), number(in.slope)).to(type);
}

// act'(z) and act''(z).
std::array<Tensor, 2> smooth_slopes(Activation act, const Tensor& z) {
  if (act == Activation::Silu) {
    const Tensor s = z.sigmoid();
    return {s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))};
  }
  const Tensor zero = at::zeros_like(z), one = at::ones_like(z);
  const Tensor above = z >= 3, between = at::logical_and(z > -3, z < 3);
  return {at::where(between, z / 3 + 0.5, at::where(above, one, zero)),
          at::where(between, one / 3, zero)};
}

// act'(z) and act''(z) as functions of what z is made of; undefined where they are 1 and 0.
std::array<Tensor, 2> slopes(const BackwardInputs& in, const Normalised& n) {
  if (in.act == Activation::Identity) return {};
  if (is_piecewise(in.act)) return {piecewise_slope(in, n.type), Tensor()};
  Tensor z = given(in.weight) ? n.broadcast(*in.weight) * n.xhat : n.xhat;
  if (given(in.bias)) z = z + n.broadcast(*in.bias);
  if (given(in.residual)) z = z + in.residual->to(n.type);
  return smooth_slopes(in.act, z);
}

}  // namespace

std::array<Tensor, 4> differentiable_backward(const BackwardInputs& in) {
  const at::ScalarType acc = accumulation_type(in.x.scalar_type());
  const Normalised n(in, acc);
  const Tensor dy = in.dy.to(acc), slope = slopes(in, n)[0];
  const Tensor g = slope.defined() ? dy * slope : dy;
  const auto as_parameter = [&](const Tensor& sums, const OptionalTensor& parameter) {
    return given(parameter)
               ? sums.to(parameter->scalar_type()).reshape_symint(parameter->sym_sizes())
               : sums;
  };
  return {(n.scale * n.project(g)).to(in.x.scalar_type()), g.to(in.x.scalar_type()),
          as_parameter(n.sum(g * n.xhat), in.weight), as_parameter(n.sum(g), in.bias)};
}

// Backward first makes g = dy * act'(z) with z = weight * xhat + bias + residual; then dresidual is
// g, and dx, dweight and dbias follow from g. Its derivative goes the same way back.
std::array<Tensor, 5> double_backward(const BackwardCotangents& dd, const BackwardInputs& in) {
  if (!given(dd.dx) && !given(dd.dresidual) && !given(dd.dweight) && !given(dd.dbias)) return {};
  const at::ScalarType type = accumulation_type(in.x.scalar_type());
  const Normalised n(in, type);
  const Tensor dy = in.dy.to(type);

  const auto [slope, curvature] = slopes(in, n);
  const Tensor g = slope.defined() ? dy * slope : dy;
  auto [g_g, g_x, g_weight] = through_batch_norm(dd, g, n);
  if (given(dd.dresidual)) add(g_g, dd.dresidual->to(type));
  Tensor g_dy, g_residual, g_bias;
  if (g_g.defined()) {
    g_dy = slope.defined() ? g_g * slope : g_g;
    if (curvature.defined()) {
      const Tensor g_z = g_g * dy * curvature;
      add(g_x, n.scale * n.project(g_z));
      add(g_weight, n.sum(g_z * n.xhat));
      g_bias = n.sum(g_z);
      g_residual = g_z;
    }
  }
  const auto as = [](const Tensor& g, const OptionalTensor& like) {
    return g.defined() && given(like) ? g.to(like->scalar_type()) : Tensor();
  };
  return {as(g_dy, in.dy), as(g_x, in.x), as(g_residual, in.residual), as(g_weight, in.weight),
          as(g_bias, in.bias)};
}

}  // namespace bnorm_ext
