// In place of torch's header of this name.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace c10 {

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using DataPtr = std::unique_ptr<void, Free>;

struct Allocator {
  static DataPtr allocate(size_t bytes) { return DataPtr(std::malloc(bytes)); }
};

inline Allocator* GetCPUAllocator() {
  static Allocator allocator;
  return &allocator;
}

}  // namespace c10
