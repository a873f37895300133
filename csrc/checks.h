// The validation of the operators' arguments, for all devices.
//
// A forward call that native batch norm refuses is handed to native to be refused (on copies of
// the buffers), so that exception type and text are native's. What only the operators take
// (outputs of the forward pass, act, residual) is refused here and in epilogue.h, naming argument
// and value.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "tensors.h"

namespace bnorm_ext {

struct ForwardArguments {
  const at::Tensor& x;
  const OptionalTensor& residual;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
};

struct GradientArguments {
  const char* op;  // named in errors
  const at::Tensor& dy;
  const at::Tensor& x;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
};

void check_forward(const ForwardArguments& a);
void check_gradient(const GradientArguments& a);
// check_gradient, and the checks of the statistics that a training forward pass returned.
void check_backward(const GradientArguments& a, const at::Tensor& mean, const at::Tensor& rstd);

// `t` is [C], of the accumulation type of x and on its device.
void check_statistic(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x);

// `t` is what mean_like gives for x, or its first row alone.
void check_mean(const char* op, const at::Tensor& t, const at::Tensor& x);

// mean and var are (W, C), count is (W,), all in double and on one device.
void check_merge(const char* op, const at::Tensor& mean, const at::Tensor& var,
                 const at::Tensor& count);

// `x` has a dtype that the kernels know and at least two dimensions.
void check_input(const char* op, const char* name, const at::Tensor& x);

}  // namespace bnorm_ext
