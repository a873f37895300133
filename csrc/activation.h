// The elementwise activations and their derivatives, written once for scalars (CUDA) and for the
// vectors of the CPU kernels, which bring the primitives below for themselves (csrc/cpu/vec.h).
//
// With z the pre-activation, fma(x - mean, scale, shift) + residual in the accumulation type:
//   relu         max(z, 0)
//   relu6        min(max(z, 0), 6)
//   leaky_relu   z > 0 ? z : slope * z
//   silu         z * sigmoid(z)
//   hardswish    z * relu6(z + 3) / 6
// NaN stays NaN. Derivatives at the kinks are torch's: 0 for relu and relu6, slope for leaky_relu,
// 0 and 1 for hardswish; where z is NaN, relu lets the gradient through, relu6 does not.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define BNORM_HOST_DEVICE __host__ __device__ __forceinline__
#define BNORM_HOST_DEVICE_OUTLINE __host__ __device__ __forceinline__
#else
#define BNORM_HOST_DEVICE inline __attribute__((always_inline))
// What takes long enough not to notice a call: kept out of loops that are unrolled.
#define BNORM_HOST_DEVICE_OUTLINE __attribute__((noinline))
#endif

namespace bnorm_ext {

enum class Activation : int8_t { Identity, Relu, Relu6, LeakyRelu, Silu, Hardswish };

// Piecewise linear: whether z is on the open side of its kinks is all that backward needs to know.
BNORM_HOST_DEVICE constexpr bool is_piecewise(Activation act) {
  return act == Activation::Relu || act == Activation::Relu6 || act == Activation::LeakyRelu;
}

// In an unnamed namespace, since files compiled for several instruction sets include this.
namespace {

// ---- Primitives, for scalars ------------------------------------------------------------------

template <typename A>
using IfScalar = typename std::enable_if<std::is_floating_point<A>::value, A>::type;

template <typename A>
BNORM_HOST_DEVICE IfScalar<A> constant(A, double c) {
  return static_cast<A>(c);
}
template <typename A>
BNORM_HOST_DEVICE IfScalar<A> exponential(A a) {
  return std::exp(a);
}
template <typename A, typename = IfScalar<A>>
BNORM_HOST_DEVICE bool greater(A a, A b) {
  return a > b;
}
// Not a <= b: also where one is NaN.
template <typename A, typename = IfScalar<A>>
BNORM_HOST_DEVICE bool beyond(A a, A b) {
  return !(a <= b);
}
BNORM_HOST_DEVICE bool both(bool a, bool b) {
  return a && b;
}
template <typename A>
BNORM_HOST_DEVICE IfScalar<A> select(bool which, A a, A b) {
  return which ? a : b;
}

// ---- Formulas ---------------------------------------------------------------------------------

template <typename V>
BNORM_HOST_DEVICE V relu(V z) {
  const V zero = constant(z, 0);
  return select(beyond(z, zero), z, zero);
}

template <typename V>
BNORM_HOST_DEVICE V relu6(V z) {
  const V six = constant(z, 6);
  return select(beyond(six, z), relu(z), six);
}

// silu or hardswish of z. exp is taken of -|z|, which cannot overflow, so that
//   sigmoid(z) = 1 / (1 + t) and 1 - sigmoid(z) = t / (1 + t), or the other way round for z < 0,
// are both exact to rounding, however close to 1 one of them is.
template <typename V>
BNORM_HOST_DEVICE_OUTLINE V smooth(Activation act, V z) {
  const V zero = constant(z, 0), one = constant(z, 1);
  if (act == Activation::Silu) {
    const auto negative = greater(zero, z);
    const V t = exponential(select(negative, z, zero - z));
    return select(negative, z * t, z) / (one + t);
  }
  return z * relu6(z + constant(z, 3)) / constant(z, 6);
}

// The gradient of z from that of y. Where hardswish is flat, an infinite dy gives 0 as well.
template <typename V>
BNORM_HOST_DEVICE_OUTLINE V smooth_gradient(Activation act, V dy, V z) {
  const V zero = constant(z, 0), one = constant(z, 1), three = constant(z, 3);
  if (act == Activation::Silu) {
    const auto negative = greater(zero, z);
    const V t = exponential(select(negative, z, zero - z));
    const V near_one = one / (one + t), rest = t * near_one;
    const V s = select(negative, rest, near_one), one_less_s = select(negative, near_one, rest);
    return dy * (s * (one + z * one_less_s));
  }
  const V between = dy * (z / three + constant(z, 0.5));
  return select(beyond(z, zero - three), select(beyond(three, z), between, dy), zero);
}

template <typename V>
BNORM_HOST_DEVICE V activate(Activation act, V z, V slope) {
  switch (act) {
    case Activation::Identity:
      return z;
    case Activation::Relu:
      return relu(z);
    case Activation::Relu6:
      return relu6(z);
    case Activation::LeakyRelu:
      return select(greater(z, constant(z, 0)), z, z * slope);
    default:
      return smooth(act, z);
  }
}

// Of a piecewise linear activation: where the gradient passes as it is.
template <typename V>
BNORM_HOST_DEVICE auto is_open(Activation act, V z) {
  const V zero = constant(z, 0);
  if (act == Activation::Relu) return beyond(z, zero);
  const auto positive = greater(z, zero);
  return act == Activation::Relu6 ? both(positive, greater(constant(z, 6), z)) : positive;
}

// What activate gives where it is known whether a piecewise linear one is open.
template <typename V, typename Mask>
BNORM_HOST_DEVICE V activate_open(Activation act, V z, Mask open, V slope) {
  if (act == Activation::Relu) return select(open, z, constant(z, 0));
  return act == Activation::LeakyRelu ? select(open, z, z * slope) : relu6(z);
}

// The gradient of z from that of y, for a piecewise linear activation: where z is known to be open,
// or from z.
template <typename V, typename Mask>
BNORM_HOST_DEVICE V through_open(Activation act, V dy, Mask open, V slope) {
  return act == Activation::LeakyRelu ? select(open, dy, dy * slope)
                                      : select(open, dy, constant(dy, 0));
}
template <typename V>
BNORM_HOST_DEVICE V through_piecewise(Activation act, V dy, V z, V slope) {
  const V zero = constant(z, 0);
  if (act == Activation::Relu) return select(beyond(z, zero), dy, zero);
  return through_open(act, dy, is_open(act, z), slope);
}

// The same for the others.
template <typename V>
BNORM_HOST_DEVICE V through_smooth(Activation act, V dy, V z) {
  return act == Activation::Identity ? dy : smooth_gradient(act, dy, z);
}

// The same for any.
template <typename V>
BNORM_HOST_DEVICE V through(Activation act, V dy, V z, V slope) {
  return is_piecewise(act) ? through_piecewise(act, dy, z, slope) : through_smooth(act, dy, z);
}

}  // namespace
}  // namespace bnorm_ext
