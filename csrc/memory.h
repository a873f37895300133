// Where tensors lie in memory: whether their elements are all there, and whether two share some.
// Arithmetic on sizes, strides and addresses; no element is read.
#pragma once

#include <ATen/ATen.h>

namespace bnorm_ext {

// Whether the storage is shorter than sizes and strides claim, as UntypedStorage.resize_ leaves it.
bool lacks_memory(const at::Tensor& t);
void check_memory(const at::Tensor& t);  // refuses it then

// Whether two elements of t lie in one place.
bool overlaps_itself(const at::Tensor& t);
// Whether an element of `a` shares memory with one of `b`.
bool overlap(const at::Tensor& a, const at::Tensor& b);

// Refuses buffers that overlap themselves, each other or one of `read`: they are updated in place,
// and the result would depend on the order in which channels are processed.
using Tensors = at::ArrayRef<const at::Tensor*>;  // null: not given
bool are_apart(Tensors buffers, Tensors read);
void check_apart(Tensors buffers, Tensors read);

}  // namespace bnorm_ext
