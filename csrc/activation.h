// The elementwise activations and their derivatives, written once for scalars and for the vectors of
// the CPU kernels. Other types than scalars bring their own overloads of the primitives below
// (csrc/cpu/vec.h, csrc/cpu/vec_activation.h; CUDA: csrc/cuda/reciprocal.cuh).
//
// With z the pre-activation, fma(x - mean, scale, shift) + residual in the accumulation type:
//   relu         max(z, 0)
//   relu6        min(max(z, 0), 6)
//   leaky_relu   z > 0 ? z : slope * z
//   silu         z * sigmoid(z)
//   hardswish    z * relu6(z + 3) / 6
// NaN stays NaN. Derivatives at the kinks are torch's: 0 for relu and relu6, slope for leaky_relu,
// 0 and 1 for hardswish. Where z is NaN, relu passes the gradient and relu6 does not.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define BNORM_HOST_DEVICE __host__ __device__ __forceinline__
#define BNORM_HOST_DEVICE_OUTLINE __host__ __device__ __forceinline__
#else
#define BNORM_HOST_DEVICE inline __attribute__((always_inline))
// For functions that take much longer than a call: not inlined, which keeps unrolled loops small.
#define BNORM_HOST_DEVICE_OUTLINE __attribute__((noinline))
#endif

namespace bnorm_ext {

enum class Activation : int8_t { Identity, Relu, Relu6, LeakyRelu, Silu, Hardswish };

// Backward of a piecewise linear activation needs one bit of z: whether z passes the gradient
// (passes_gradient below).
BNORM_HOST_DEVICE constexpr bool is_piecewise(Activation act) {
  return act == Activation::Relu || act == Activation::Relu6 || act == Activation::LeakyRelu;
}

// In an unnamed namespace, because files compiled for different instruction sets include this.
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
// !(a <= b), which is true where a or b is NaN.
template <typename A, typename = IfScalar<A>>
BNORM_HOST_DEVICE bool not_less_equal(A a, A b) {
  return !(a <= b);
}
template <typename A>
BNORM_HOST_DEVICE IfScalar<A> select(bool which, A a, A b) {
  return which ? a : b;
}

// Quotients, for every type that has an operator /. They have names because a GPU has no
// instruction for a division: there it takes twenty, and a branch.
template <typename V>
BNORM_HOST_DEVICE V over_one_to_two(V a, V d) {  // a / d for 1 <= d <= 2
  return a / d;
}
template <typename V>
BNORM_HOST_DEVICE V over_three(V a) {
  return a / constant(a, 3);
}
template <typename V>
BNORM_HOST_DEVICE V product_over_six(V a, V b) {
  return a * b / constant(a, 6);
}

// ---- Formulas ---------------------------------------------------------------------------------

template <typename V>
BNORM_HOST_DEVICE V relu(V z) {
  const V zero = constant(z, 0);
  return select(not_less_equal(z, zero), z, zero);
}

template <typename V>
BNORM_HOST_DEVICE V relu6(V z) {
  const V six = constant(z, 6);
  return select(not_less_equal(six, z), relu(z), six);
}

// silu or hardswish of z. With t = exp(-|z|), which cannot overflow,
//   sigmoid(z) = 1 / (1 + t) and 1 - sigmoid(z) = t / (1 + t), or the other way round for z < 0.
// Neither is computed by subtraction, so both are accurate even where sigmoid(z) is close to 1.
template <typename V>
BNORM_HOST_DEVICE_OUTLINE V smooth(Activation act, V z) {
  const V zero = constant(z, 0), one = constant(z, 1);
  if (act == Activation::Silu) {
    const auto negative = greater(zero, z);
    const V t = exponential(select(negative, z, zero - z));
    return over_one_to_two(select(negative, z * t, z), one + t);
  }
  return product_over_six(z, relu6(z + constant(z, 3)));
}

// The gradient of z from dy. Where hardswish is constant, it is 0 even if dy is infinite.
template <typename V>
BNORM_HOST_DEVICE_OUTLINE V smooth_gradient(Activation act, V dy, V z) {
  const V zero = constant(z, 0), one = constant(z, 1), three = constant(z, 3);
  if (act == Activation::Silu) {
    const auto negative = greater(zero, z);
    const V t = exponential(select(negative, z, zero - z));
    const V near_one = over_one_to_two(one, one + t), rest = t * near_one;
    const V s = select(negative, rest, near_one), one_less_s = select(negative, near_one, rest);
    return dy * (s * (one + z * one_less_s));
  }
  const V between = dy * (over_three(z) + constant(z, 0.5));
  return select(not_less_equal(z, zero - three), select(not_less_equal(three, z), between, dy),
                zero);
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

// Whether the gradient passes unchanged through a piecewise linear activation at z.
template <typename V>
BNORM_HOST_DEVICE auto passes_gradient(Activation act, V z) {
  const V zero = constant(z, 0);
  if (act == Activation::Relu) return not_less_equal(z, zero);
  auto passes = greater(z, zero);
  if (act == Activation::Relu6) passes = passes & greater(constant(z, 6), z);
  return passes;
}

// activate for a piecewise linear activation, where passes = passes_gradient(act, z) is known.
template <typename V, typename Mask>
BNORM_HOST_DEVICE V activate_piecewise(Activation act, V z, Mask passes, V slope) {
  if (act == Activation::Relu) return select(passes, z, constant(z, 0));
  return act == Activation::LeakyRelu ? select(passes, z, z * slope) : relu6(z);
}

// The gradient of z from dy for a piecewise linear activation: from passes_gradient(act, z), which
// forward may have saved, or from z.
template <typename V, typename Mask>
BNORM_HOST_DEVICE V masked_backward(Activation act, V dy, Mask passes, V slope) {
  return act == Activation::LeakyRelu ? select(passes, dy, dy * slope)
                                      : select(passes, dy, constant(dy, 0));
}
template <typename V>
BNORM_HOST_DEVICE V piecewise_backward(Activation act, V dy, V z, V slope) {
  const V zero = constant(z, 0);
  if (act == Activation::Relu) return select(not_less_equal(z, zero), dy, zero);
  return masked_backward(act, dy, passes_gradient(act, z), slope);
}

// The gradient of z for Identity and the smooth activations.
template <typename V>
BNORM_HOST_DEVICE V smooth_backward(Activation act, V dy, V z) {
  return act == Activation::Identity ? dy : smooth_gradient(act, dy, z);
}

// The gradient of z for any activation.
template <typename V>
BNORM_HOST_DEVICE V activation_backward(Activation act, V dy, V z, V slope) {
  return is_piecewise(act) ? piecewise_backward(act, dy, z, slope) : smooth_backward(act, dy, z);
}

}  // namespace
}  // namespace bnorm_ext
