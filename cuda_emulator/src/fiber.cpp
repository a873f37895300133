// The checked longjmp of _FORTIFY_SOURCE treats a jump to another stack as an error.
#undef _FORTIFY_SOURCE

#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(EMULATOR_FIBERS_BOOST)
#include <boost/context/detail/fcontext.hpp>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace detail {

struct Fiber::Context {
  void (*entry)() = nullptr;  // null: the context of a caller
  char* stack = nullptr;      // its lowest address
  std::size_t stack_bytes = 0;
  std::size_t colour = 0;
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
#endif
#if defined(EMULATOR_FIBERS_BOOST)
  boost::context::detail::fcontext_t at = nullptr;
#else
  bool jumps = false;  // `jump` is set: a switch left it
  jmp_buf jump;
  ucontext_t start;
#endif
};

namespace {

using Context = Fiber::Context;

// The address sanitizer needs more, because it puts space between variables. An odd number of
// pages, so that the same depth of different stacks does not map to the same cache sets.
#ifdef EMULATOR_ASAN
constexpr std::size_t kStackBytes = 65 * 4096;
#else
constexpr std::size_t kStackBytes = 17 * 4096;
#endif
constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kGuardedStacks = 8192;
constexpr std::size_t kStacksPerMapping = 64;

char* new_stack() {
  static char* next = nullptr;
  static std::size_t left = 0;
  if (left == 0) {
    void* mapping = mmap(nullptr, kStacksPerMapping * kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) {
      std::perror("emulator: no memory for stacks");
      std::abort();
    }
    next = static_cast<char*>(mapping);
    left = kStacksPerMapping;
  }
  --left;
  char* stack = next;
  next += kStackBytes;
  // With a guard page a stack overflow ends the program instead of overwriting the next stack. A
  // guard costs two mappings, of which a process may have about 65000: later stacks have no guard.
  static std::size_t guarded = 0;
  if (guarded++ < kGuardedStacks) mprotect(stack, kGuardBytes, PROT_NONE);
  return stack + kGuardBytes;
}

std::size_t new_colour() {
  static std::size_t count = 0;
  return count++ % 16 * 192;
}

// Source and target of the switch in progress.
Context* leaving = nullptr;
Context* entering = nullptr;

void before_switch(Context& from, Context& to) {
  leaving = &from;
  entering = &to;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
}

// Runs first on the stack that was switched to.
void after_switch(Context& here) {
#ifdef EMULATOR_ASAN
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &bytes);
  // The stack of a caller was not allocated here; its place is learned when it is left.
  if (leaving->entry == nullptr) {
    leaving->stack = static_cast<char*>(const_cast<void*>(bottom));
    leaving->stack_bytes = bytes;
  }
#else
  static_cast<void>(here);
#endif
}

#if defined(EMULATOR_FIBERS_BOOST)

void enter(boost::context::detail::transfer_t transfer) {
  leaving->at = transfer.fctx;
  Context& here = *entering;
  after_switch(here);
  here.entry();
}

void prepare(Context& c) {
  c.at = boost::context::detail::make_fcontext(c.stack + c.stack_bytes - c.colour,
                                               c.stack_bytes - c.colour, &enter);
}

void change(Context&, Context& to) {
  const auto back = boost::context::detail::jump_fcontext(to.at, nullptr);
  leaving->at = back.fctx;
}

#else

void enter() {
  Context& here = *entering;
  after_switch(here);
  here.entry();
}

void prepare(Context& c) {
  c.jumps = false;
  getcontext(&c.start);
  c.start.uc_stack.ss_sp = c.stack;
  c.start.uc_stack.ss_size = c.stack_bytes - c.colour;
  c.start.uc_link = nullptr;
  makecontext(&c.start, &enter, 0);
}

// swapcontext makes system calls to save the signal mask, so it only starts a stack; after that
// _setjmp and _longjmp switch. The address sanitizer supports only swapcontext.
void change(Context& from, Context& to) {
#ifdef EMULATOR_ASAN
  swapcontext(&from.start, &to.start);
#else
  if (_setjmp(from.jump) == 0) {
    from.jumps = true;
    if (to.jumps) _longjmp(to.jump, 1);
    setcontext(&to.start);
  }
#endif
}

#endif

}  // namespace

#if defined(EMULATOR_FIBERS_BOOST)
const char* Fiber::kind() {
  return "boost";
}
#else
const char* Fiber::kind() {
  return "ucontext";
}
#endif

Fiber::Fiber() : context_(std::make_unique<Context>()) {}

Fiber::Fiber(void (*entry)()) : context_(std::make_unique<Context>()) {
  context_->entry = entry;
  context_->stack = new_stack();
  context_->stack_bytes = kStackBytes - kGuardBytes;
  context_->colour = new_colour();
  restart();
}

Fiber::~Fiber() = default;

void Fiber::restart() {
#ifdef EMULATOR_ASAN
  context_->fake_stack = nullptr;
  __asan_unpoison_memory_region(context_->stack, context_->stack_bytes);
#endif
  prepare(*context_);
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  Context& here = *from.context_;
  before_switch(here, *to.context_);
  change(here, *to.context_);
  after_switch(here);
}

}  // namespace detail
}  // namespace emulator
