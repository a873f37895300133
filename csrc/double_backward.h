// The backward pass and its derivative, in plain differentiable ATen operations: differentiable
// again, in reverse and in forward mode.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <tuple>

#include "epilogue.h"

namespace bnorm_ext {

// What a backward pass was given.
struct BackwardInputs {
  at::Tensor dy, x;
  OptionalTensor residual, weight, bias;
  // Of the batch with `train`, else the running ones: [C], acc; of the mean also [2, C] (mean_like).
  at::Tensor mean, rstd;
  bool train;
  OptionalTensor mask;
  Activation act;
  double slope;
};

// Beside a mask the residual may be a stand-in without storage, which kernels would copy.
inline OptionalTensor residual_to_read(const OptionalTensor& residual, const OptionalTensor& mask) {
  return given(mask) && mask->sym_numel() != 0 ? std::nullopt : residual;
}

// Gradients of (x, residual, weight, bias): what the kernels compute, up to rounding.
std::array<at::Tensor, 4> differentiable_backward(const BackwardInputs& in);

// Gradients of what the backward pass returned; absent where nothing flows.
struct BackwardCotangents {
  OptionalTensor dx, dresidual, dweight, dbias;
};

// Gradients of (dy, x, residual, weight, bias); undefined where nothing flows.
std::array<at::Tensor, 5> double_backward(const BackwardCotangents& dd, const BackwardInputs& in);

}  // namespace bnorm_ext
