// The arguments and results of the CPU kernels. Free of torch headers.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bnorm_ext {
namespace cpu {

struct ForwardParams {
  Shape shape;
  DType dtype = DType::Float;   // of x, y and residual
  const void* x = nullptr;      // [N, C, S]
  void* y = nullptr;            // [N, C, S]
  const void* mean = nullptr;   // [C] acc
  const void* scale = nullptr;  // [C] acc, weight * rstd
  // [C] acc, shift_of(bias, ...): in training without act, corrected for the rounded mean.
  const void* shift = nullptr;
  // y = act(fma(x - mean, scale, shift) + residual)
  const void* residual = nullptr;  // [N, C, S] or null
  Activation act = Activation::Identity;
  double slope = 0;               // of leaky_relu
  uint8_t* mask = nullptr;        // bits laid out by MaskRows (plan.h), written; or null
  bool nontemporal = false;       // y is written with nontemporal stores
  int64_t prefetch_distance = 0;  // elements; of x and residual, where stores are nontemporal
};

struct BackwardParams {
  Shape shape;
  DType dtype = DType::Float;  // of dy, x, dx, residual and dresidual
  const void* dy = nullptr;    // [N, C, S]
  const void* x = nullptr;     // [N, C, S]
  void* dx = nullptr;          // [N, C, S] or null
  const void* mean = nullptr;  // [C] acc
  const void* rstd = nullptr;  // [C] acc
  // With xhat = (x - mean) * rstd: dx = ((g - mean_g) - xhat * mean_g_xhat) * scale. In inference
  // the statistics are constants: dx = g * scale, and mean_dy is null.
  const void* mean_dy = nullptr;       // [C] acc, mean_g; or null
  const void* mean_dy_xhat = nullptr;  // [C] acc, mean_g_xhat; or null
  const void* scale = nullptr;         // [C] acc, weight * rstd
  // g is the gradient of z = fma(x - mean, scale, shift) + residual, where y = act(z).
  const void* shift = nullptr;     // [C] acc, bias; null where act is identity
  const void* residual = nullptr;  // [N, C, S] or null
  Activation act = Activation::Identity;
  double slope = 0;               // of leaky_relu
  const uint8_t* mask = nullptr;  // what forward wrote, read in place of z; or null
  void* dresidual = nullptr;      // [N, C, S], receives g; or null
  bool nontemporal = false;       // dx and dresidual are written with nontemporal stores
  int64_t prefetch_distance = 0;  // elements; of dy, x and residual, where stores are nontemporal
};

// The part of each channel that one call of a kernel covers: samples [n0, n1), positions [s0, s1)
// of each sample.
struct Span {
  int64_t n0, n1, s0, s1;
  int64_t count() const { return (n1 - n0) * (s1 - s0); }
};

// The moments of one channel in a span: its mean is anchor + delta, m2 is the sum of squared
// deviations from it. The mean is kept in two parts, because the sum may not hold all the digits of
// a small delta.
struct Moments {
  double anchor;
  double delta;
  double m2;
};

// The backward sums of one channel in a span, with xhat = (x - mean) * rstd.
struct Sums {
  double dy;       // of g
  double dy_xhat;  // of g * xhat
};

}  // namespace cpu
}  // namespace bnorm_ext
