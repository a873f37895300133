// Contexts that are switched between by hand, each with a stack of its own.
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
  // The context that the caller runs in.
  Fiber();
  // A stack, from which `entry` will be called. It never returns.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Drops what ran on this stack, without unwinding it; the next switch calls `entry` again.
  void restart();

  static void switch_to(Fiber& from, Fiber& to);
  static const char* kind();

  struct Context;

 private:
  std::unique_ptr<Context> context_;
};

}  // namespace detail
}  // namespace emulator
