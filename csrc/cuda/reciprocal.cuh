// Activations in the accumulation type, with the divisions of silu and hardswish by a reciprocal.
#pragma once

#include <type_traits>

#include "../activation.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// 1 / d for 1 <= d <= 2, or NaN: one Newton step from an estimate r that is off by at most a unit
// in the last place. With e = 1 - d * r, exact in a fused multiply-add, 1 / d = r / (1 - e), and
// r + r * e leaves out r * e^2, which is 2^-46. So the result is that of a division but where 1 / d
// lies within 2^-22 units of the middle between two floats.
BNORM_HOST_DEVICE float reciprocal(float d) {
  const float r = reciprocal_estimate(d);
  return fma(r, fma(-d, r, 1.0f), r);
}

// A float for the formulas of ../activation.h that divides by multiplying. With u = 2^-24, its
// quotients are off by at most 2u, relative to their size; those of a division by u.
struct ByReciprocal {
  float value;
};
BNORM_HOST_DEVICE ByReciprocal operator+(ByReciprocal a, ByReciprocal b) {
  return {a.value + b.value};
}
BNORM_HOST_DEVICE ByReciprocal operator-(ByReciprocal a, ByReciprocal b) {
  return {a.value - b.value};
}
BNORM_HOST_DEVICE ByReciprocal operator*(ByReciprocal a, ByReciprocal b) {
  return {a.value * b.value};
}
BNORM_HOST_DEVICE ByReciprocal constant(ByReciprocal, double c) {
  return {static_cast<float>(c)};
}
BNORM_HOST_DEVICE ByReciprocal exponential(ByReciprocal a) {
  return {bnorm_ext::exponential(a.value)};
}
BNORM_HOST_DEVICE bool greater(ByReciprocal a, ByReciprocal b) {
  return a.value > b.value;
}
BNORM_HOST_DEVICE bool not_less_equal(ByReciprocal a, ByReciprocal b) {
  return !(a.value <= b.value);
}
BNORM_HOST_DEVICE ByReciprocal select(bool which, ByReciprocal a, ByReciprocal b) {
  return which ? a : b;
}
BNORM_HOST_DEVICE ByReciprocal over_one_to_two(ByReciprocal a, ByReciprocal d) {
  return {a.value * reciprocal(d.value)};
}
BNORM_HOST_DEVICE ByReciprocal over_three(ByReciprocal a) {
  return {a.value * (1.0f / 3)};
}
// In this order nothing overflows where b is at most 6, and 6 gives a itself.
BNORM_HOST_DEVICE ByReciprocal product_over_six(ByReciprocal a, ByReciprocal b) {
  return {a.value * (b.value * (1.0f / 6))};
}

BNORM_HOST_DEVICE constexpr bool is_smooth(Activation act) {
  return act == Activation::Silu || act == Activation::Hardswish;
}

// activate and activation_backward of ../activation.h for an activation that is known when this is
// compiled. double divides, because its activations are not what its kernels wait for.
template <Activation kAct, typename A>
BNORM_HOST_DEVICE A activate(A z, A slope) {
  if constexpr (is_smooth(kAct) && std::is_same_v<A, float>) {
    return smooth(kAct, ByReciprocal{z}).value;
  } else {
    return bnorm_ext::activate(kAct, z, slope);
  }
}
template <Activation kAct, typename A>
BNORM_HOST_DEVICE A activation_backward(A dy, A z, A slope) {
  if constexpr (is_smooth(kAct) && std::is_same_v<A, float>) {
    return smooth_gradient(kAct, ByReciprocal{dy}, ByReciprocal{z}).value;
  } else {
    return bnorm_ext::activation_backward(kAct, dy, z, slope);
  }
}

}  // namespace cuda
}  // namespace bnorm_ext
