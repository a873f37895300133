#include "checks.h"

#include "memory.h"

namespace bnorm_ext {
namespace {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

// Whether t has C elements on the device of x and the dtype `type`, which all such tensors of a call
// share. It is that of x or, for 16-bit x, float: what native takes.
bool fits(const OptionalTensor& t, const at::Tensor& x, std::optional<at::ScalarType>& type) {
  if (!given(t)) return true;
  const at::ScalarType own = t->scalar_type();
  if (!type) type = own;
  return own == *type && (own == x.scalar_type() || own == accumulation_type(x.scalar_type())) &&
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

// The texts before at::batch_norm are those of native's Python layer; its C++ layer raises the rest.
[[noreturn]] void refuse_as_native(const ForwardArguments& a) {
  // Native, and a clone, would read what is not there.
  check_memory(a.x);
  for (const OptionalTensor* t : {&a.weight, &a.bias, &a.running_mean, &a.running_var}) {
    if (given(*t)) check_memory(**t);
  }
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
  TORCH_CHECK_NOT_IMPLEMENTED(false, "bnorm_ext: no kernels for these arguments, which native ",
                              "takes, with input of shape ", a.x.sizes(), ", dtype ",
                              a.x.scalar_type(), ", layout ", a.x.layout());
}

}  // namespace

void check_forward(const ForwardArguments& a) {
  if (!is_acceptable(a)) refuse_as_native(a);
  if (given(a.num_batches_tracked)) {
    const at::Tensor& counter = *a.num_batches_tracked;
    TORCH_CHECK(counter.scalar_type() == at::kLong && counter.numel() == 1 &&
                    counter.device() == a.x.device(),
                "num_batches_tracked must be one int64 value on ", a.x.device(), ", but got shape ",
                counter.sizes(), ", dtype ", counter.scalar_type(), " on ", counter.device());
    check_memory(counter);
  }
  TORCH_CHECK_TYPE(
      !a.training || a.momentum || given(a.num_batches_tracked) || !given(a.running_mean),
      "momentum=None needs num_batches_tracked");
  if (a.training) {
    check_apart({or_null(a.running_mean), or_null(a.running_var), or_null(a.num_batches_tracked)},
                {&a.x, or_null(a.residual), or_null(a.weight), or_null(a.bias)});
  }
}

void check_input(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.layout() == at::kStrided && x.dim() >= 2, op, ": ", name,
              " must be a strided tensor of two or more dimensions, but got shape ", x.sizes(),
              ", layout ", x.layout());
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported(x.scalar_type()), op, ": \"", name,
                              "\" not implemented for '", x.scalar_type(), "'");
}

namespace {

void check_channels(const char* op, const char* name, const at::Tensor& t, bool has_shape,
                    const at::Tensor& x) {
  const at::ScalarType type = accumulation_type(x.scalar_type());
  TORCH_CHECK(has_shape && t.is_contiguous() && t.scalar_type() == type && t.device() == x.device(),
              op, ": ", name, " must be ", x.size(1), " contiguous values of ", type, " on ",
              x.device(), ", but got shape ", t.sizes(), ", dtype ", t.scalar_type(), " on ",
              t.device());
  check_memory(t);
}

}  // namespace

void check_statistic(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  check_channels(op, name, t, t.dim() == 1 && t.size(0) == x.size(1), x);
}

void check_mean(const char* op, const at::Tensor& t, const at::Tensor& x) {
  // Not the first row as a tensor of its own: making it takes longer than all checks.
  if (t.dim() == 2) {
    check_channels(op, "mean", t, t.size(0) == 2 && t.size(1) == x.size(1), x);
  } else {
    check_statistic(op, "mean", t, x);
  }
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
  for (const at::Tensor& t : {mean, var, count}) check_memory(t);
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
  check_mean(a.op, mean, a.x);
  check_statistic(a.op, "rstd", rstd, a.x);
}

}  // namespace bnorm_ext
