#include "memory.h"

#include <algorithm>
#include <vector>

namespace bnorm_ext {
namespace {

bool has_memory(const at::Tensor& t) {
  return t.layout() == at::kStrided && t.has_storage() && !t.is_meta() && !t.is_nested() &&
         !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && t.numel() > 0;
}

// Elements from the first to behind the last in memory. No stride of a tensor is negative.
int64_t extent(const at::Tensor& t) {
  if (t.is_contiguous()) return t.numel();
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return last + 1;
}

int64_t first_byte(const at::Tensor& t) {
  return t.storage_offset() * static_cast<int64_t>(t.element_size());
}
int64_t end_byte(const at::Tensor& t) {
  return first_byte(t) + extent(t) * static_cast<int64_t>(t.element_size());
}

// Calls f with the first byte of each element.
template <typename F>
void for_each_byte_offset(const at::Tensor& t, int64_t d, int64_t byte, const F& f) {
  if (d == t.dim()) {
    f(byte);
    return;
  }
  const int64_t step = t.stride(d) * static_cast<int64_t>(t.element_size());
  for (int64_t i = 0; i < t.size(d); ++i) for_each_byte_offset(t, d + 1, byte + i * step, f);
}

}  // namespace

bool lacks_memory(const at::Tensor& t) {
  return has_memory(t) &&
         end_byte(t) > static_cast<int64_t>(t.storage().unsafeGetStorageImpl()->nbytes());
}

void check_memory(const at::Tensor& t) {
  TORCH_CHECK(!lacks_memory(t), "bnorm_ext: a tensor of shape ", t.sizes(), " and strides ",
              t.strides(), " lies outside of its storage of ",
              t.storage().unsafeGetStorageImpl()->nbytes(), " bytes");
}

bool overlaps_itself(const at::Tensor& t) {
  if (!has_memory(t) || t.is_non_overlapping_and_dense()) return false;
  std::vector<int64_t> bytes;
  for_each_byte_offset(t, 0, 0, [&](int64_t byte) { bytes.push_back(byte); });
  std::sort(bytes.begin(), bytes.end());
  return std::adjacent_find(bytes.begin(), bytes.end()) != bytes.end();
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  if (!has_memory(a) || !has_memory(b) || !a.storage().is_alias_of(b.storage())) return false;
  if (end_byte(a) <= first_byte(b) || end_byte(b) <= first_byte(a)) return false;
  if (a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense()) return true;
  // Such as two columns of one matrix, whose ranges overlap while their elements do not.
  std::vector<int64_t> bytes;
  for_each_byte_offset(a, 0, first_byte(a), [&](int64_t byte) { bytes.push_back(byte); });
  std::sort(bytes.begin(), bytes.end());
  const auto size_a = static_cast<int64_t>(a.element_size());
  const auto size_b = static_cast<int64_t>(b.element_size());
  bool found = false;
  for_each_byte_offset(b, 0, first_byte(b), [&](int64_t byte) {
    // The first element of `a` that ends behind the beginning of this one.
    const auto next = std::upper_bound(bytes.begin(), bytes.end(), byte - size_a);
    found = found || (next != bytes.end() && *next < byte + size_b);
  });
  return found;
}

bool are_apart(Tensors buffers, Tensors read) {
  for (auto buffer = buffers.begin(); buffer != buffers.end(); ++buffer) {
    if (*buffer == nullptr) continue;
    if (overlaps_itself(**buffer)) return false;
    const auto meets = [&](const at::Tensor* other) {
      return other != nullptr && overlap(**buffer, *other);
    };
    if (std::any_of(buffer + 1, buffers.end(), meets)) return false;
    if (std::any_of(read.begin(), read.end(), meets)) return false;
  }
  return true;
}

void check_apart(Tensors buffers, Tensors read) {
  TORCH_CHECK(are_apart(buffers, read),
              "bnorm_ext: running_mean, running_var and num_batches_tracked are updated in place, "
              "and must not share memory with each other or with another argument. Please clone() "
              "them before the call");
}

}  // namespace bnorm_ext
