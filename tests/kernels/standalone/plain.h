// The same results from plain loops in double, and how far the kernels' may be from them.
//
// Every bound is kRoundings times the unit roundoff of the accumulation type, times the sum of the
// magnitudes that make up the value, plus half a unit in the last place of the tensor's dtype. The
// magnitude of xhat is at least 1, because the mean is as exact as the standard deviation is large.
// kRoundings: the variance has at most 10 (difference from the anchor twice, as it is squared; the
// square; a tree of 16 values; the last rows of a chunk; what taking the mean from the anchor leaves
// of them), which reach y, g and dx by its square root; rstd, scale, difference, product, sum and
// residual add one each, exponential and quotients six.
#pragma once

#include <cstdio>

#include "passes.h"

namespace {

constexpr double kRoundings = 16;

// A sum that keeps what each addition rounds away (Neumaier): right to about two roundings.
struct Exact {
  void add(double value) {
    const double next = sum + value;
    rest += std::fabs(sum) >= std::fabs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  double total() const { return sum + rest; }
  double sum = 0, rest = 0;
};

double activated(Activation act, double z) {
  switch (act) {
    case Activation::Relu:
      return z > 0 ? z : 0;
    case Activation::Relu6:
      return z > 6 ? 6 : z > 0 ? z : 0;
    case Activation::LeakyRelu:
      return z > 0 ? z : kSlope * z;
    case Activation::Silu:
      return z / (1 + std::exp(-z));
    case Activation::Hardswish:
      return z <= -3 ? 0 : z >= 3 ? z : z * (z + 3) / 6;
    default:
      return z;
  }
}

double derivative(Activation act, double z) {
  switch (act) {
    case Activation::Relu:
      return z > 0 ? 1 : 0;
    case Activation::Relu6:
      return z > 0 && z < 6 ? 1 : 0;
    case Activation::LeakyRelu:
      return z > 0 ? 1 : kSlope;
    case Activation::Silu: {
      const double sigmoid = 1 / (1 + std::exp(-z));
      return sigmoid * (1 + z * (1 - sigmoid));
    }
    case Activation::Hardswish:
      return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
    default:
      return 1;
  }
}

// How far z is from where the derivative jumps: nearer than z is exact, either side is right.
double to_jump(Activation act, double z) {
  if (act == Activation::Hardswish) return std::fabs(std::fabs(z) - 3);
  if (act == Activation::Relu6) return std::fmin(std::fabs(z), std::fabs(z - 6));
  return is_piecewise(act) ? std::fabs(z) : INFINITY;
}

class Comparison {
 public:
  Comparison(const Case& c, DType dtype, const Inputs& in, const Results& out)
      : c_(c), dtype_(dtype), in_(in), out_(out) {
    for (int64_t i = 0; i < c.shape.C; ++i) channel(i);
  }
  double worst() const { return worst_; }  // error, relative to its bound
  int failures() const { return failures_; }

 private:
  void close(const char* what, int64_t where, double got, double want, double bound) {
    const double share = bound > 0 ? std::fabs(got - want) / bound : got == want ? 0 : INFINITY;
    if (share <= 1) {
      worst_ = std::fmax(worst_, share);
    } else if (++failures_ <= 3) {  // NaN too
      std::printf("%s, %s: %s[%lld] is %.9g instead of %.9g, %.3g of what is allowed\n", c_.name,
                  format_of(dtype_).name, what, static_cast<long long>(where), got, want, share);
    }
  }

  template <typename F>
  void for_each(int64_t channel, F f) const {  // f(element, its bit of the mask)
    const Shape& s = c_.shape;
    const MaskRows rows(s);
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t first = (n * s.C + channel) * s.S, bit = rows.bit(first, n, channel);
      for (int64_t i = 0; i < s.S; ++i) f(first + i, bit + i);
    }
  }

  void channel(int64_t c) {
    const Format& format = format_of(dtype_);
    const double u = kRoundings * (dtype_ == DType::Double ? 0x1p-53 : 0x1p-24);
    const double count = static_cast<double>(c_.shape.count());
    const auto stored = [&](double value) {  // the error of rounding it to the tensor's dtype
      return 1.01 * format.roundoff() * std::fabs(value) + format.smallest() / 2;
    };
    Exact sum, squares;
    for_each(c, [&](int64_t i, int64_t) { sum.add(in_.x[i]); });
    const double mean = sum.total() / count;
    Exact left_out;  // of the mean, by rounding it
    for_each(c, [&](int64_t i, int64_t) { left_out.add(in_.x[i] - mean); });
    const double rest = left_out.total() / count;
    const auto deviation = [&](int64_t i) { return (in_.x[i] - mean) - rest; };
    for_each(c, [&](int64_t i, int64_t) { squares.add(deviation(i) * deviation(i)); });
    const double var = squares.total() / count, rstd = 1 / std::sqrt(var + kEps);
    const double scale = in_.weight[c] * rstd;
    // The mean is held in double: of a large one, double's own last place is lost.
    close("mean", c, out_.mean[c], mean, u * std::sqrt(var) + 0x1p-52 * std::fabs(mean));
    close("var", c, out_.var[c], var, u * var);

    // The terms of z, and those that are known of its gradient.
    const auto at = [&](int64_t i) {
      struct {
        double xhat, size, z, z_bound, y, g, g_bound;  // size: of xhat, at least 1
        bool clear;                                    // which side of a jump z is on
      } e;
      const double r = c_.residual ? in_.residual[i] : 0, dy = in_.dy[i];
      e.xhat = deviation(i) * rstd;
      e.size = std::fmax(1, std::fabs(e.xhat));
      e.z = in_.weight[c] * e.xhat + in_.bias[c] + r;
      e.z_bound = u * (std::fabs(in_.weight[c]) * e.size + std::fabs(in_.bias[c]) + std::fabs(r));
      e.y = activated(c_.act, e.z);
      e.g = dy * derivative(c_.act, e.z);
      e.clear = to_jump(c_.act, e.z) > e.z_bound;
      const bool curved = c_.act == Activation::Silu || c_.act == Activation::Hardswish;
      e.g_bound = !e.clear ? 1.1 * std::fabs(dy)
                  : curved ? std::fabs(dy) * (e.z_bound / 2 + u)
                           : u * std::fabs(e.g);
      return e;
    };
    Exact sum_g, sum_g_xhat;
    double g_bound = 0, g_xhat_bound = 0;
    for_each(c, [&](int64_t i, int64_t bit) {
      const auto e = at(i);
      const double bound = 1.1 * e.z_bound + u * std::fabs(e.y) + stored(e.y);
      close("y", i, out_.y[i], e.y, bound);
      close("evaluated", i, out_.evaluated[i], e.y, bound);
      sum_g.add(e.g);
      sum_g_xhat.add(e.g * e.xhat);
      g_bound += e.g_bound;
      g_xhat_bound += e.g_bound * e.size + u * std::fabs(e.g) * e.size;
      if (!e.clear) return;
      const double constant = e.g * scale;
      close("dx of constant statistics", i, out_.dx_constant[i], constant,
            std::fabs(scale) * e.g_bound + u * std::fabs(constant) + stored(constant));
      if (c_.residual) {
        close("dresidual", i, out_.dresidual[i], e.g, e.g_bound + stored(e.g));
      }
      if (c_.masked()) {
        const int passes = out_.mask.as<uint8_t>()[bit / 8] >> (bit % 8) & 1;
        close("mask", i, passes, derivative(c_.act, e.z) == 1, 0);
      }
    });
    close("sum of g", c, out_.sum_g[c], sum_g.total(), g_bound);
    close("sum of g * xhat", c, out_.sum_g_xhat[c], sum_g_xhat.total(), g_xhat_bound);
    const double mean_g = sum_g.total() / count, mean_g_xhat = sum_g_xhat.total() / count;
    for_each(c, [&](int64_t i, int64_t) {
      const auto e = at(i);
      if (!e.clear) return;
      const double projected = e.xhat * mean_g_xhat, dx = (e.g - mean_g - projected) * scale;
      const double sent = std::fabs(e.g) + std::fabs(mean_g) + e.size * std::fabs(mean_g_xhat);
      const double bound = e.g_bound + g_bound / count + e.size * g_xhat_bound / count + u * sent;
      close("dx", i, out_.dx[i], dx, std::fabs(scale) * bound + stored(dx));
    });
  }

  const Case& c_;
  DType dtype_;
  const Inputs& in_;
  const Results& out_;
  double worst_ = 0;
  int failures_ = 0;
};

// Every float16 or bfloat16 there is, stored as it was loaded; and with half a unit in its last place
// added, which is a tie. Returns the number of wrong ones.
int wrong_conversions(DType dtype) {
  const Format& f = format_of(dtype);
  constexpr int64_t kCount = 65536;
  Elements x(dtype, kCount), y(dtype, kCount), half(dtype, kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    x.as<uint16_t>()[i] = static_cast<uint16_t>(i);
    const double value = x[i];
    if (value - value == 0) half.set(i, std::ldexp(1, exponent_of(f, value) - f.digits));
  }
  const float mean = 0, scale = 1, shift = -0.0f;
  ForwardParams p;
  p.shape = {1, 1, kCount, Layout::ChannelsFirst};
  p.dtype = dtype;
  p.x = x.as();
  p.y = y.as();
  p.mean = &mean;
  p.scale = &scale;
  p.shift = &shift;
  int wrong = 0;
  for (const bool tie : {false, true}) {
    p.residual = tie ? half.as() : nullptr;
    kernels().apply[static_cast<int>(dtype)](p, {0, 1, 0, kCount}, 0, 1);
    for (int64_t i = 0; i < kCount; ++i) {
      const double want = rounded(f, tie ? x[i] + half[i] : x[i]), got = y[i];
      const bool same = want != want ? got != got : y.as<uint16_t>()[i] == to_bits(f, want);
      if (!same && ++wrong <= 3) {
        std::printf("%s %04x%s: %g instead of %g\n", f.name, static_cast<unsigned>(i),
                    tie ? " and half a unit" : "", got, want);
      }
    }
  }
  return wrong;
}

}  // namespace
