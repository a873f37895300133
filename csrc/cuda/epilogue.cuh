// What follows the normalisation, a vector at a time: y = act(z) and the gradient of z, with
//   z = fma(x - mean, weight * rstd, bias) + residual
// Forward and backward both compute z here, so that they agree on every bit of it.
#pragma once

#include <type_traits>

#include "affine.cuh"
#include "reciprocal.cuh"

namespace bnorm_ext {
namespace cuda {

// Calls f(std::integral_constant<Activation, act>{}): one branch for all values of a vector.
template <typename F>
__device__ __forceinline__ void with_activation(Activation act, F f) {
  switch (act) {
    case Activation::Identity:
      return f(std::integral_constant<Activation, Activation::Identity>{});
    case Activation::Relu:
      return f(std::integral_constant<Activation, Activation::Relu>{});
    case Activation::Relu6:
      return f(std::integral_constant<Activation, Activation::Relu6>{});
    case Activation::LeakyRelu:
      return f(std::integral_constant<Activation, Activation::LeakyRelu>{});
    case Activation::Silu:
      return f(std::integral_constant<Activation, Activation::Silu>{});
    default:
      return f(std::integral_constant<Activation, Activation::Hardswish>{});
  }
}

// z of a vector, in the accumulation type. `residual` is added if `add`, else not read.
template <typename T, int kWidth, typename Affines>
__device__ __forceinline__ void z_of(const Affines& affines, const Values<T, kWidth>& x, bool add,
                                     const Values<T, kWidth>& residual, Acc<T> (&z)[kWidth]) {
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    const Affine<Acc<T>> affine = affines[v % Affines::kChannels];
    z[v] = fma(x[v] - affine.mean, affine.scale, affine.shift);
  }
  if (!add) return;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) z[v] += residual[v];
}

// The epilogue of forward: turns a vector of x into the vector of y. With `with_bits` and a
// piecewise linear activation, returns the vector's bits of the mask: bit v is passes_gradient(act,
// z[v]).
template <typename T, int kWidth, typename Affines>
__device__ __forceinline__ unsigned epilogue_forward(const EpilogueParams& e, bool with_bits,
                                                     const Affines& affines, Values<T, kWidth>& vec,
                                                     const Values<T, kWidth>& residual) {
  using A = Acc<T>;
  const A slope = static_cast<A>(e.slope);
  unsigned mask_bits = 0;
  A z[kWidth];
  z_of(affines, vec, e.residual != nullptr, residual, z);
  with_activation(e.act, [&](auto act) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      if (is_piecewise(act.value) && with_bits) {
        mask_bits |= static_cast<unsigned>(passes_gradient(act.value, z[v])) << v;
      }
      vec.set(v, activate<decltype(act)::value>(z[v], slope));
    }
  });
  return mask_bits;
}

// The epilogue of backward: the gradient g of z from dy, in the accumulation type. If `masked`,
// from the vector's bits of the mask, else from z; then x and residual must have been loaded.
template <typename T, int kWidth, typename Affines>
__device__ __forceinline__ void epilogue_backward(const EpilogueParams& e, bool masked,
                                                  unsigned mask_bits, const Affines& affines,
                                                  const Values<T, kWidth>& dy,
                                                  const Values<T, kWidth>& x,
                                                  const Values<T, kWidth>& residual,
                                                  Acc<T> (&g)[kWidth]) {
  using A = Acc<T>;
  const A slope = static_cast<A>(e.slope);
  if (e.act == Activation::Identity) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v) g[v] = dy[v];
  } else if (masked) {
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      g[v] = masked_backward(e.act, dy[v], (mask_bits >> v & 1) != 0, slope);
    }
  } else {
    z_of(affines, x, e.residual != nullptr, residual, g);
    with_activation(e.act, [&](auto act) {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        g[v] = activation_backward<decltype(act)::value>(dy[v], g[v], slope);
      }
    });
  }
}

}  // namespace cuda
}  // namespace bnorm_ext
