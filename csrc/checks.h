// Every validation of the operators, once, for all devices; and the view of a tensor as [N, C, S].
//
// A forward call that native batch norm refuses is handed to native to be refused (on copies of
// the buffers), so that exception type and text are native's. What only the operators take
// (outputs of the forward pass, act, residual) is refused here, naming argument and value.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "params.h"

namespace bnorm_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

// A tensor that the kernels can walk.
struct Input {
  at::Tensor tensor;  // dense in `format`: the caller's own where it is, else a copy
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  Shape shape;
  DType dtype = DType::Float;
};

struct ForwardArguments {
  const at::Tensor& x;
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

DType dtype_of(const at::Tensor& t);

// float for 16-bit types, else the type itself: of mean, rstd and everything accumulated.
at::ScalarType accumulation_type(at::ScalarType type);

// The caller's tensor of C elements, or an absent one.
ChannelVector channel_vector(const OptionalTensor& t);

// x as [N, C, S]; x.dim() >= 2 and a supported dtype must have been checked.
Input resolve(const at::Tensor& x);

// Uninitialised, in the memory format that native gives its output for x.
at::Tensor output_like(const at::Tensor& x, const Input& in);

// Uninitialised, in the memory format that native gives the gradient of x.
at::Tensor gradient_like(const at::Tensor& x, const Input& in);

// For the gradient of a parameter, or of one that was not given: uninitialised, or 0 where x is
// empty.
at::Tensor parameter_gradient_like(const OptionalTensor& parameter, const at::Tensor& x);

// `other` in the layout of `like`: itself where it is dense so, else a copy.
at::Tensor in_layout_of(const at::Tensor& other, const Input& like);

// x in channels-last where dy is, unless a mask ties x to its own format. A convolution whose output
// was channels-last takes its gradient fastest so, hence x that is channels-last stays so as well.
at::Tensor channels_last_as(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mask);

// Uninitialised: one value per channel of x, in the accumulation type.
at::Tensor statistic_like(const at::Tensor& x);

void check_forward(const ForwardArguments& a);
void check_gradient(const GradientArguments& a);
// And the statistics that a training forward pass returned.
void check_backward(const GradientArguments& a, const at::Tensor& mean, const at::Tensor& rstd);

// `t` is [C], of the accumulation type of x and on its device.
void check_statistic(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x);

// mean and var are (W, C), count is (W,), all in double and on one device.
void check_merge(const char* op, const at::Tensor& mean, const at::Tensor& var,
                 const at::Tensor& count);

// `x` has a dtype that the kernels know and at least two dimensions.
void check_input(const char* op, const char* name, const at::Tensor& x);

// Throws a ValueError that lists the known ones.
Activation activation_named(std::string_view act);
const char* activation_name(Activation act);

// What follows the normalisation: y = act(z), z = normalised x + residual.
struct Epilogue {
  Activation act = Activation::Identity;
  double slope = 0;     // of leaky_relu
  at::Tensor residual;  // in the layout of x, or undefined
  at::Tensor mask;      // given to backward, or undefined

  // Whether forward has to write a mask for backward.
  bool leaves_mask() const { return residual.defined() && is_piecewise(act); }
  // What backward reads to know z, beside x.
  bool reads_mask() const { return mask.defined(); }
};

// Refuses an unknown `act` (ValueError) and a residual that is not like x.
Epilogue forward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                          std::string_view act, double negative_slope,
                          const OptionalTensor& residual);

// mask_bytes: how long the device's mask for x is. A mask that is empty counts as none.
Epilogue backward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                           std::string_view act, double negative_slope,
                           const OptionalTensor& residual, const OptionalTensor& mask,
                           int64_t mask_bytes);

// Uninitialised; `bytes` is 0 where nobody needs one.
at::Tensor new_mask(const at::Tensor& x, int64_t bytes);

}  // namespace bnorm_ext
