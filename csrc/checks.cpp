#include "checks.h"

#include <limits>

namespace bnorm_ext {
namespace {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

bool is_16_bit(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16;
}

// C elements on the device of x, all such tensors of one call of the same dtype `type`, which is
// that of x or, for 16-bit x, float: what native takes.
bool fits(const OptionalTensor& t, const at::Tensor& x, std::optional<at::ScalarType>& type) {
  if (!given(t)) return true;
  const at::ScalarType own = t->scalar_type();
  if (!type) type = own;
  return own == *type &&
         (own == x.scalar_type() || (own == at::kFloat && is_16_bit(x.scalar_type()))) &&
         t->device() == x.device() && t->layout() == at::kStrided && t->numel() == x.size(1);
}

// A training batch of one value per channel; native counts so even where there are no channels.
bool has_one_value_per_channel(const at::Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d < x.dim(); ++d) count *= d == 1 ? 1 : x.size(d);
  return count == 1;
}

bool is_acceptable(const ForwardArguments& a) {
  const at::Tensor& x = a.x;
  if (x.layout() != at::kStrided || !is_supported(x.scalar_type()) || x.dim() < 2) return false;
  if (a.training ? a.eps <= 0 || has_one_value_per_channel(x) : a.eps < 0) return false;
  // Native returns early for an empty input, before it looks at anything else.
  if (x.numel() == 0) return true;
  if (given(a.running_mean) != given(a.running_var)) return false;
  if (!a.training && !given(a.running_mean)) return false;
  std::optional<at::ScalarType> type;
  if (!fits(a.weight, x, type) || !fits(a.bias, x, type) || !fits(a.running_mean, x, type) ||
      !fits(a.running_var, x, type)) {
    return false;
  }
  // Native reads weight and bias of any rank, running statistics of rank 1 only.
  return !given(a.running_mean) || (a.running_mean->dim() == 1 && a.running_var->dim() == 1);
}

at::Tensor copy_of(const OptionalTensor& t) {
  return given(t) ? t->detach().clone() : at::Tensor();
}

// Native's Python layer checks what is in the first lines here, its C++ layer the rest.
[[noreturn]] void refuse_as_native(const ForwardArguments& a) {
  if (a.training && a.x.dim() >= 2 && has_one_value_per_channel(a.x)) {
    TORCH_CHECK_VALUE(false,
                      "Expected more than 1 value per channel when training, got input size "
                      "torch.Size(",
                      a.x.sizes(), ")");
  }
  TORCH_CHECK_VALUE(!a.training || !(a.eps <= 0),
                    "batch_norm eps must be positive during training, but got ", a.eps);
  TORCH_CHECK_VALUE(!(a.eps < 0), "batch_norm eps must be non-negative, but got ", a.eps);
  TORCH_CHECK_VALUE(!a.training || given(a.running_mean) == given(a.running_var),
                    "running_mean and running_var must either both be None or neither be None");
  at::batch_norm(a.x.detach(), copy_of(a.weight), copy_of(a.bias), copy_of(a.running_mean),
                 copy_of(a.running_var), a.training, a.momentum.value_or(0.1), a.eps,
                 /*cudnn_enabled=*/false);
  TORCH_CHECK(false, "bnorm_ext: unsupported input of shape ", a.x.sizes(), ", dtype ",
              a.x.scalar_type(), ", layout ", a.x.layout());
}

}  // namespace

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::Float;
    case at::kDouble:
      return DType::Double;
    case at::kHalf:
      return DType::Half;
    case at::kBFloat16:
      return DType::BFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "bnorm_ext: no kernels for ", t.scalar_type());
  }
}

at::ScalarType accumulation_type(at::ScalarType type) {
  return is_16_bit(type) ? at::kFloat : type;
}

ChannelVector channel_vector(const OptionalTensor& t) {
  if (!given(t)) return {};
  // Weight and bias may have any rank; only a strided one cannot be walked with one stride.
  TORCH_CHECK(t->dim() == 1 || t->is_contiguous(), "bnorm_ext: a per-channel tensor of shape ",
              t->sizes(), " must be contiguous");
  const int64_t stride = t->dim() == 1 ? t->stride(0) : 1;
  return {t->data_ptr(), stride, dtype_of(*t)};
}

Input resolve(const at::Tensor& x) {
  Input in;
  // One channel or one position is dense in several formats; native calls that contiguous.
  in.format = x.is_contiguous() ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
  in.tensor = x.contiguous(in.format);
  in.dtype = dtype_of(x);
  int64_t spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
  in.shape = {x.size(0), x.size(1), spatial, Layout::ChannelsFirst};
  if (in.format != at::MemoryFormat::Contiguous || spatial == 1) {
    in.shape.layout = Layout::ChannelsLast;
  }
  if (in.shape.C == 1) {
    // One long row instead of N short ones; the two layouts coincide.
    in.shape = {1, 1, x.size(0) * spatial, Layout::ChannelsFirst};
  }
  return in;
}

at::Tensor output_like(const at::Tensor& x, const Input& in) {
  // An empty input has no format of its own, and native clones it.
  return x.numel() == 0 ? at::empty_like(x) : at::empty_like(in.tensor, in.format);
}

at::Tensor gradient_like(const at::Tensor& x, const Input& in) {
  // Other strides than the output's in the case above only, where both mean the same order.
  return x.numel() == 0 ? at::empty_like(x) : at::empty_like(in.tensor, x.suggest_memory_format());
}

at::Tensor parameter_gradient_like(const OptionalTensor& parameter, const at::Tensor& x) {
  const at::Tensor out = given(parameter) ? at::empty_like(*parameter, at::MemoryFormat::Contiguous)
                                          : statistic_like(x);
  return x.numel() == 0 ? out.zero_() : out;
}

at::Tensor in_layout_of(const at::Tensor& other, const Input& like) {
  return other.contiguous(like.format);
}

at::Tensor channels_last_as(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mask) {
  const bool tied = given(mask) && mask->numel() > 0;
  if (tied || dy.layout() != at::kStrided || dy.sizes() != x.sizes()) return x;
  const auto format_of = [](const at::Tensor& t) {
    return t.is_contiguous() ? at::MemoryFormat::Contiguous : t.suggest_memory_format();
  };
  const at::MemoryFormat format = format_of(dy);
  if (format == at::MemoryFormat::Contiguous || !dy.is_contiguous(format)) return x;
  return format == format_of(x) ? x : x.contiguous(format);
}

at::Tensor statistic_like(const at::Tensor& x) {
  return at::empty({x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
}

void check_forward(const ForwardArguments& a) {
  if (!is_acceptable(a)) refuse_as_native(a);
  if (given(a.num_batches_tracked)) {
    const at::Tensor& counter = *a.num_batches_tracked;
    TORCH_CHECK(counter.scalar_type() == at::kLong && counter.numel() == 1 &&
                    counter.device() == a.x.device(),
                "num_batches_tracked must be one int64 value on ", a.x.device(), ", but got shape ",
                counter.sizes(), ", dtype ", counter.scalar_type(), " on ", counter.device());
  }
  TORCH_CHECK_TYPE(
      !a.training || a.momentum || given(a.num_batches_tracked) || !given(a.running_mean),
      "momentum=None needs num_batches_tracked");
}

void check_input(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.layout() == at::kStrided && x.dim() >= 2, op, ": ", name,
              " must be a strided tensor of two or more dimensions, but got shape ", x.sizes(),
              ", layout ", x.layout());
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported(x.scalar_type()), op, ": \"", name,
                              "\" not implemented for '", x.scalar_type(), "'");
}

void check_statistic(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  const at::ScalarType type = accumulation_type(x.scalar_type());
  TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1) && t.is_contiguous() &&
                  t.scalar_type() == type && t.device() == x.device(),
              op, ": ", name, " must be ", x.size(1), " contiguous values of ", type, " on ",
              x.device(), ", but got shape ", t.sizes(), ", dtype ", t.scalar_type(), " on ",
              t.device());
}

void check_merge(const char* op, const at::Tensor& mean, const at::Tensor& var,
                 const at::Tensor& count) {
  TORCH_CHECK(mean.dim() == 2 && mean.sizes() == var.sizes() && count.dim() == 1 &&
                  count.size(0) == mean.size(0) && mean.scalar_type() == at::kDouble &&
                  var.scalar_type() == at::kDouble && count.scalar_type() == at::kDouble,
              op, ": mean and var must be (W, C) and count (W,), all in double, but got shapes ",
              mean.sizes(), ", ", var.sizes(), ", ", count.sizes(), " and dtypes ",
              mean.scalar_type(), ", ", var.scalar_type(), ", ", count.scalar_type());
  TORCH_CHECK(mean.device() == var.device() && mean.device() == count.device(), op,
              ": mean, var and count must be on one device, but are on ", mean.device(), ", ",
              var.device(), ", ", count.device());
}

void check_gradient(const GradientArguments& a) {
  check_input(a.op, "x", a.x);
  TORCH_CHECK(a.dy.sizes() == a.x.sizes() && a.dy.scalar_type() == a.x.scalar_type() &&
                  a.dy.device() == a.x.device() && a.dy.layout() == at::kStrided,
              a.op, ": dy must be like x (shape ", a.x.sizes(), ", dtype ", a.x.scalar_type(),
              " on ", a.x.device(), "), but got shape ", a.dy.sizes(), ", dtype ",
              a.dy.scalar_type(), " on ", a.dy.device());
  std::optional<at::ScalarType> type;
  TORCH_CHECK(fits(a.weight, a.x, type) && fits(a.bias, a.x, type), a.op,
              ": weight and bias must be ", a.x.size(1), " values of one dtype, that of x (",
              a.x.scalar_type(), ") or float for 16-bit x, on ", a.x.device());
}

void check_backward(const GradientArguments& a, const at::Tensor& mean, const at::Tensor& rstd) {
  check_gradient(a);
  check_statistic(a.op, "mean", mean, a.x);
  check_statistic(a.op, "rstd", rstd, a.x);
}

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
  e.mask = *mask;
  return e;
}

at::Tensor new_mask(const at::Tensor& x, int64_t bytes) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

}  // namespace bnorm_ext
