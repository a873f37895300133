// Execution contexts, each with its own stack, between which the scheduler switches explicitly.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

namespace emulator {
namespace detail {

class Fiber {
 public:
  // The context of the caller.
  Fiber();
  // A new stack, on which `entry` will be called. `entry` must not return.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Drops what ran on this stack without unwinding it; the next switch calls `entry` again.
  void restart();

  static void switch_to(Fiber& from, Fiber& to);
  static const char* kind();

  struct Context;

 private:
  std::unique_ptr<Context> context_;
};

}  // namespace detail
}  // namespace emulator
