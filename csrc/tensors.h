// The caller's tensors as kernels see them, [N, C, S] in one of two layouts, and the allocation of
// what an operator returns.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "params.h"

namespace bnorm_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

inline const at::Tensor* or_null(const at::Tensor& t) {
  return &t;
}
inline const at::Tensor* or_null(const OptionalTensor& t) {
  return given(t) ? &*t : nullptr;
}

// A tensor that the kernels can walk.
struct Input {
  at::Tensor tensor;  // dense in `format`: the caller's own where it is, else a copy
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  Shape shape;
  DType dtype = DType::Float;
};

DType dtype_of(const at::Tensor& t);

// float for 16-bit types, else the type itself: of mean, rstd and everything accumulated.
at::ScalarType accumulation_type(at::ScalarType type);

// x as [N, C, S]; x.dim() >= 2 and a supported dtype must have been checked.
Input resolve(const at::Tensor& x);

// The caller's tensor of C elements, or an absent one.
ChannelVector channel_vector(const OptionalTensor& t);

// Statistics in the form that a training forward pass returns them in: mean [2, C] (mean_like), or [C]
// where nothing is known of its rounding, and rstd [C].
Statistics known_statistics(const at::Tensor& mean, const at::Tensor& rstd);

// `other` in the layout of `like`: itself where it is dense so, else a copy.
at::Tensor in_layout_of(const at::Tensor& other, const Input& like);

// x in channels-last where dy is, unless a mask ties x to its own format. A convolution with a
// channels-last output takes a channels-last gradient fastest, so x that is channels-last stays so.
at::Tensor channels_last_as(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mask);

// Uninitialised, in the memory format that native gives its output for x.
at::Tensor output_like(const at::Tensor& x, const Input& in);

// Uninitialised, in the memory format that native gives the gradient of x for this gradient of y.
at::Tensor gradient_like(const at::Tensor& x, const Input& in, const at::Tensor& dy);

// For the gradient of a parameter, or of one that was not given: uninitialised, or 0 where x is
// empty.
at::Tensor parameter_gradient_like(const OptionalTensor& parameter, const at::Tensor& x);

// Uninitialised: one value per channel of x, in the accumulation type.
at::Tensor statistic_like(const at::Tensor& x);

// Uninitialised, [2, C]: the mean of each channel of x, rounded to the accumulation type, and what
// rounding it has left out.
at::Tensor mean_like(const at::Tensor& x);

}  // namespace bnorm_ext
