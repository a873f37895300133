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

// The epilogue of a kernel: its parameters or, where V::kPlain, constants that are none.
template <typename V>
__device__ __forceinline__ EpilogueParams epilogue_of(const EpilogueParams& e) {
  return V::kPlain ? EpilogueParams{} : e;
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

// The epilogue of forward: turns the first `valid` vectors of a batch of x into those of y. With
// `with_bits` and a piecewise linear activation, returns their bits of the mask: bit u * 8 + v is
// passes_gradient(act, z) of value v of vector u.
template <typename T, int kWidth, typename Affines, typename Valid>
__device__ __forceinline__ unsigned epilogue_forward(const EpilogueParams& e, bool with_bits,
                                                     const Affines& affines,
                                                     Values<T, kWidth> (&batch)[kBatch],
                                                     const Values<T, kWidth> (&residual)[kBatch],
                                                     Valid valid) {
  using A = Acc<T>;
  const A slope = static_cast<A>(e.slope);
  unsigned mask_bits = 0;
  with_activation(e.act, [&](auto act) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) continue;
      A z[kWidth];
      z_of(affines, batch[u], e.residual != nullptr, residual[u], z);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        if (is_piecewise(act.value) && with_bits) {
          mask_bits |= static_cast<unsigned>(passes_gradient(act.value, z[v]))
                       << (u * kByteBits + v);
        }
        z[v] = activate<decltype(act)::value>(z[v], slope);
      }
      batch[u].set(z);
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
    // Constants in shared memory are read here, not once before the loop: they would take registers
    // from the activations that do not need them.
    forget_loads();
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
