// One value for each device, made at its first use and then read without a lock.
#pragma once

#include <atomic>
#include <memory>

namespace bnorm_ext {
namespace cuda {

constexpr int kMostDevices = 128;  // torch numbers devices in 7 bits

// Objects of this class are static. What they hold is never destroyed: other threads, and CUDA's
// own, may still run while the process exits.
template <typename T>
class PerDevice {
 public:
  // make() returns a std::unique_ptr<T>. Where it throws, the next call makes the value.
  template <typename Make>
  T& get(int device, Make make) {
    std::atomic<T*>& made = made_[device];
    if (T* value = made.load(std::memory_order_acquire)) return *value;
    std::unique_ptr<T> fresh = make();
    T* expected = nullptr;
    // Two threads may both make one: the first to arrive here wins.
    if (made.compare_exchange_strong(expected, fresh.get(), std::memory_order_acq_rel)) {
      return *fresh.release();
    }
    return *expected;
  }

 private:
  std::atomic<T*> made_[kMostDevices] = {};
};

}  // namespace cuda
}  // namespace bnorm_ext
