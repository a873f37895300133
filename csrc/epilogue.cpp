#include "epilogue.h"

#include "memory.h"

namespace bnorm_ext {

Activation activation_named(std::string_view act) {
  for (const Activation known : {Activation::Identity, Activation::Relu, Activation::Relu6,
                                 Activation::LeakyRelu, Activation::Silu, Activation::Hardswish}) {
    if (act == activation_name(known)) return known;
  }
  TORCH_CHECK_VALUE(false, "unknown activation '", act,
                    "': expected identity, relu, relu6, leaky_relu, silu or hardswish");
}

const char* activation_name(Activation act) {
  switch (act) {
    case Activation::Identity:
      return "identity";
    case Activation::Relu:
      return "relu";
    case Activation::Relu6:
      return "relu6";
    case Activation::LeakyRelu:
      return "leaky_relu";
    case Activation::Silu:
      return "silu";
    default:
      return "hardswish";
  }
}

Epilogue forward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                          std::string_view act, double negative_slope,
                          const OptionalTensor& residual) {
  Epilogue e;
  e.act = activation_named(act);
  e.slope = negative_slope;
  if (!given(residual)) return e;
  const at::Tensor& r = *residual;
  TORCH_CHECK(r.sizes() == x.sizes() && r.scalar_type() == x.scalar_type() &&
                  r.device() == x.device() && r.layout() == at::kStrided,
              op, ": residual must be like the input (shape ", x.sizes(), ", dtype ",
              x.scalar_type(), " on ", x.device(), "), but got shape ", r.sizes(), ", dtype ",
              r.scalar_type(), " on ", r.device());
  e.residual = in_layout_of(r, in);
  return e;
}

Epilogue backward_epilogue(const char* op, const Input& in, const at::Tensor& x,
                           std::string_view act, double negative_slope,
                           const OptionalTensor& residual, const OptionalTensor& mask,
                           int64_t mask_bytes) {
  Epilogue e = forward_epilogue(op, in, x, act, negative_slope, residual);
  if (!given(mask) || mask->numel() == 0 || x.numel() == 0) return e;
  TORCH_CHECK(is_piecewise(e.act), op, ": a mask is of no use to act='", act, "'");
  TORCH_CHECK(mask->scalar_type() == at::kByte && mask->dim() == 1 && mask->is_contiguous() &&
                  mask->numel() == mask_bytes && mask->device() == x.device(),
              op, ": mask must be the ", mask_bytes, " bytes on ", x.device(),
              " that the forward pass returned, but got shape ", mask->sizes(), ", dtype ",
              mask->scalar_type(), " on ", mask->device());
  check_memory(*mask);
  e.mask = *mask;
  return e;
}

}  // namespace bnorm_ext
