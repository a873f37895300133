// Memory that a call needs besides its tensors.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

namespace bnorm_ext {
namespace cpu {

// `count` values, not initialised: on the stack up to kOnStack, else from the allocator of torch's
// CPU tensors, so that running out of memory is torch's error here too.
template <typename T, int64_t kOnStack>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(stack_) {
    if (count <= kOnStack) return;
    heap_ = c10::GetCPUAllocator()->allocate(static_cast<size_t>(count) * sizeof(T));
    data_ = static_cast<T*>(heap_.get());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T stack_[kOnStack];
  c10::DataPtr heap_;
  T* data_;
};

}  // namespace cpu
}  // namespace bnorm_ext
