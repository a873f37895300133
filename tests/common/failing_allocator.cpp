// An allocator of CPU tensors that refuses chosen allocations and counts what lives. Free of ATen:
// compiling it takes seconds. tests/common/failing_allocator.py drives it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<int64_t> allocations{0};  // since `arm`
std::atomic<int64_t> living{0};
std::atomic<int64_t> first_refused{-1};  // of the allocations counted from 0; -1: none
std::atomic<bool> refuses_rest{false};   // those after it too

struct Block {
  c10::DataPtr data;
};

void release(void* block) {
  delete static_cast<Block*>(block);
  --living;
}

class Failing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const int64_t number = allocations++, first = first_refused;
    if (number == first || (refuses_rest && first >= 0 && number > first)) {
      // The error is torch's own: nobody has so much memory.
      return ordinary_->allocate(size_t{1} << 62);
    }
    auto* block = new Block{ordinary_->allocate(bytes)};
    ++living;
    return {block->data.get(), block, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    ordinary_->copy_data(to, from, bytes);
  }

 private:
  c10::Allocator* ordinary_ = c10::GetDefaultCPUAllocator();
};

c10::Allocator* before = nullptr;
constexpr uint8_t kPriority = 100;  // of whatever else a test has installed

}  // namespace

extern "C" {

// From now on allocation number `first` fails, counted from 0, and if `rest` all that follow.
void arm(int64_t first, bool rest) {
  static Failing failing;
  allocations = 0;
  first_refused = first;
  refuses_rest = rest;
  if (before != nullptr) return;
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&failing, kPriority);
}

// How many there have been.
int64_t disarm() {
  if (before != nullptr) c10::SetCPUAllocator(before, kPriority);
  before = nullptr;
  return allocations;
}

// Allocated while armed and not freed yet.
int64_t alive() {
  return living;
}
}
