// The normalisation, and the gradient through the activation and the addition behind it. Forward
// and backward compute z by the same expression, so that they find it on the same side of a kink.
#pragma once

#include <type_traits>

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

// How g, the gradient of z, is found.
enum class Gradient {
  Relu,       // ReLU without an addition: from x
  Relu6,      // ReLU6 without an addition: from x
  Masked,     // ReLU or ReLU6 behind an addition: from the mask
  Piecewise,  // any piecewise linear activation
  Smooth,     // Identity, SiLU and Hardswish. Apart, because they call a function
              // (`smooth_gradient`), and a loop with a call keeps no vector in a register
};

// Computes g for a vector.
template <typename T, Gradient kGradient>
struct EpilogueBackward {
  using V = VectorOf<T>;
  static constexpr bool kFromInput = kGradient == Gradient::Relu || kGradient == Gradient::Relu6;
  static constexpr bool kFromMask = kGradient == Gradient::Masked;

  Activation act;
  V slope;
  const T* residual;    // or null
  const uint8_t* mask;  // or null

  explicit BNORM_INLINE EpilogueBackward(const BackwardParams& p)
      : act(p.act),
        slope(V::all(static_cast<Acc<T>>(p.slope))),
        residual(static_cast<const T*>(p.residual)),
        mask(p.mask) {
    if (kGradient == Gradient::Relu || kFromMask) act = Activation::Relu;
    if (kGradient == Gradient::Relu6) act = Activation::Relu6;
  }

  // deviation: x - mean; at: where the vector is.
  template <typename P>
  BNORM_INLINE V operator()(V dy, V deviation, Offset at, P part, V scale, V shift) const {
    if (kFromMask || (kGradient == Gradient::Piecewise && mask != nullptr)) {
      return masked_backward(act, dy, from_mask(V{}, read_bits(mask, at.bit)), slope);
    }
    V z = normalise(deviation, scale, shift);
    if (!kFromInput && residual != nullptr) z = z + load(residual + at.element, part, V::all(0));
    if (kGradient == Gradient::Smooth) return smooth_backward(act, dy, z);
    return piecewise_backward(act, dy, z, slope);
  }
};

// Calls f(EpilogueBackward) for the activation of this call: with Piecewise or Smooth.
template <typename T, typename F>
BNORM_INLINE void with_epilogue_backward(const BackwardParams& p, F f) {
  if (is_piecewise(p.act)) {
    f(EpilogueBackward<T, Gradient::Piecewise>(p));
  } else {
    f(EpilogueBackward<T, Gradient::Smooth>(p));
  }
}

// Whether Relu, Relu6 and Masked are compiled beside Piecewise, for loops without a branch: for
// vectors of at least eight floats. For those of bfloat16 they were no faster (bench/NOTES.md, 45).
template <typename T>
constexpr bool kHasOwnLoops = std::is_same<VectorOf<T>, Vec<float>>::value && Vec<float>::W >= 8;

// Calls f with Relu or Relu6. Returns false where this call is of another kind.
template <typename T, typename F>
BNORM_INLINE bool with_relu_of_input(const BackwardParams& p, F f) {
  if constexpr (kHasOwnLoops<T>) {
    if (p.residual != nullptr || p.mask != nullptr) return false;
    if (p.act == Activation::Relu) return f(EpilogueBackward<T, Gradient::Relu>(p)), true;
    if (p.act == Activation::Relu6) return f(EpilogueBackward<T, Gradient::Relu6>(p)), true;
  }
  return false;
}

// Calls f with Masked. Returns false where this call is of another kind.
template <typename T, typename F>
BNORM_INLINE bool with_mask_of_sum(const BackwardParams& p, F f) {
  if constexpr (kHasOwnLoops<T>) {
    if (p.mask == nullptr || p.act == Activation::LeakyRelu) return false;
    return f(EpilogueBackward<T, Gradient::Masked>(p)), true;
  }
  return false;
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
