// What follows the normalisation, y = act(z) with z = normalised x + residual: its arguments,
// checked.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "tensors.h"

namespace bnorm_ext {

// Throws a ValueError that lists the known ones.
Activation activation_named(std::string_view act);
const char* activation_name(Activation act);

struct Epilogue {
  Activation act = Activation::Identity;
  double slope = 0;     // of leaky_relu
  at::Tensor residual;  // in the layout of x, or undefined
  at::Tensor mask;      // given to backward, or undefined

  // Whether backward needs a mask from forward.
  bool leaves_mask() const { return residual.defined() && is_piecewise(act); }
  // Whether backward reads the mask instead of computing z from x.
  bool reads_mask() const { return mask.defined(); }
};

// Refuses an unknown `act` (ValueError) and a residual that is not like x.
Epilogue forward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                          std::string_view act, double negative_slope,
                          const OptionalTensor& residual);

// mask_bytes: the length of the device's mask for x. An empty mask counts as none.
Epilogue backward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                           std::string_view act, double negative_slope,
                           const OptionalTensor& residual, const OptionalTensor& mask,
                           int64_t mask_bytes);

}  // namespace bnorm_ext
