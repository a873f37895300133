#include "tensors.h"

#include "memory.h"

namespace bnorm_ext {
namespace {

// One channel or one position is dense in several formats; native calls that contiguous. Asked
// before the strides, because those of dimensions of size 1 may be any.
at::MemoryFormat format_of(const at::Tensor& t) {
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast3d,
                            at::MemoryFormat::ChannelsLast}) {
    if (t.is_contiguous(format)) return format;
  }
  return t.suggest_memory_format();
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
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

Input resolve(const at::Tensor& x) {
  check_memory(x);
  Input in;
  in.format = format_of(x);
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

ChannelVector channel_vector(const OptionalTensor& t) {
  if (!given(t)) return {};
  check_memory(*t);
  // Weight and bias may have any rank; only a strided one cannot be walked with one stride.
  TORCH_CHECK(t->dim() == 1 || t->is_contiguous(), "bnorm_ext: a per-channel tensor of shape ",
              t->sizes(), " must be contiguous");
  const int64_t stride = t->dim() == 1 ? t->stride(0) : 1;
  return {t->data_ptr(), stride, dtype_of(*t)};
}

Statistics known_statistics(const at::Tensor& mean, const at::Tensor& rstd) {
  const ChannelVector rounded{mean.data_ptr(), 1, dtype_of(mean)};
  ChannelVector rest;
  if (mean.dim() == 2) {
    rest = rounded;
    rest.data = static_cast<char*>(mean.data_ptr()) + mean.size(1) * mean.element_size();
  }
  return {rounded, channel_vector(rstd), /*is_rstd=*/true, /*eps=*/0, rest};
}

at::Tensor in_layout_of(const at::Tensor& other, const Input& like) {
  check_memory(other);
  return other.contiguous(like.format);
}

at::Tensor channels_last_as(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mask) {
  const bool tied = given(mask) && mask->numel() > 0;
  if (tied || dy.layout() != at::kStrided || dy.sizes() != x.sizes()) return x;
  const at::MemoryFormat format = format_of(dy);
  if (format == at::MemoryFormat::Contiguous || !dy.is_contiguous(format)) return x;
  return format == format_of(x) ? x : x.contiguous(format);
}

at::Tensor output_like(const at::Tensor& x, const Input& in) {
  // An empty input has no format of its own, and native clones it.
  return x.numel() == 0 ? at::empty_like(x) : at::empty_like(in.tensor, in.format);
}

at::Tensor gradient_like(const at::Tensor& x, const Input& in, const at::Tensor& dy) {
  if (x.numel() == 0) return at::empty_like(x);
  // Other strides than the output's only where x is dense in several formats; both then mean the
  // same order of the elements.
  const auto suggested = x.suggest_memory_format();
  const bool alike = dy.is_contiguous(format_of(dy)) && dy.suggest_memory_format() == suggested;
  return at::empty_like(in.tensor, x.is_contiguous() && !alike ? suggested : in.format);
}

at::Tensor parameter_gradient_like(const OptionalTensor& parameter, const at::Tensor& x) {
  const at::Tensor out = given(parameter) ? at::empty_like(*parameter, at::MemoryFormat::Contiguous)
                                          : statistic_like(x);
  return x.numel() == 0 ? out.zero_() : out;
}

at::Tensor statistic_like(const at::Tensor& x) {
  return at::empty({x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
}

at::Tensor mean_like(const at::Tensor& x) {
  return at::empty({2, x.size(1)}, x.options().dtype(accumulation_type(x.scalar_type())));
}

}  // namespace bnorm_ext
