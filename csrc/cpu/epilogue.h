// The normalisation, and the gradient through the activation and the addition behind it. Forward
// and backward compute z by the same expression, so that they find it on the same side of a kink.
#pragma once

#include "mask.h"
#include "plan.h"
#include "vec_activation.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// deviation: x - mean
template <typename V>
BNORM_INLINE V normalise(V deviation, V scale, V shift) {
  return fma(deviation, scale, shift);
}

// Computes g, the gradient of z, for a vector. kPiecewise: the activation is piecewise linear. The
// other ones have a type of their own, because they call a function (`smooth_gradient`), and a loop
// with a call keeps no vector in a register.
template <typename T, bool kPiecewise>
struct EpilogueBackward {
  using V = VectorOf<T>;
  Activation act;
  V slope;
  const T* residual;    // or null
  const uint8_t* mask;  // or null

  explicit BNORM_INLINE EpilogueBackward(const BackwardParams& p)
      : act(p.act),
        slope(V::all(static_cast<Acc<T>>(p.slope))),
        residual(static_cast<const T*>(p.residual)),
        mask(p.mask) {}

  // deviation: x - mean; at: where the vector is.
  template <typename P>
  BNORM_INLINE V operator()(V dy, V deviation, Offset at, P part, V scale, V shift) const {
    if (kPiecewise && mask != nullptr) {
      return masked_backward(act, dy, from_mask(V{}, read_bits(mask, at.bit)), slope);
    }
    V z = normalise(deviation, scale, shift);
    if (residual != nullptr) z = z + load(residual + at.element, part, V::all(0));
    if (kPiecewise) return piecewise_backward(act, dy, z, slope);
    return smooth_backward(act, dy, z);
  }
};

// Calls f(EpilogueBackward) for the activation of this call.
template <typename T, typename F>
BNORM_INLINE void with_epilogue_backward(const BackwardParams& p, F f) {
  if (is_piecewise(p.act)) {
    f(EpilogueBackward<T, true>(p));
  } else {
    f(EpilogueBackward<T, false>(p));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
