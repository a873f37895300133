// The derivative of the backward pass, in plain differentiable ATen operations: differentiable
// again.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <tuple>

#include "checks.h"

namespace bnorm_ext {

// Gradients of (dy, x, weight), where output_mask wants them, given those of dx, dweight and dbias;
// undefined where nothing flows. mean, rstd: of the batch in training, else the running ones.
std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(
    const OptionalTensor& ddx, const OptionalTensor& ddweight, const OptionalTensor& ddbias,
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight, const at::Tensor& mean,
    const at::Tensor& rstd, bool training, std::array<bool, 3> output_mask);

}  // namespace bnorm_ext
