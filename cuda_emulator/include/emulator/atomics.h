// Atomics on integers, by raw pointer or by Shared<T>, Distributed<T>, Workspace<T>. Floating-point
// atomics are missing on purpose: their order, and so the result, changes from run to run.
#pragma once

#include <cstring>
#include <type_traits>

#include "pointers.h"
#include "runtime.h"

namespace emulator {
namespace detail {

template <typename T>
struct AtomicValue {};
template <>
struct AtomicValue<int> {
  using Type = int;
};
template <>
struct AtomicValue<unsigned> {
  using Type = unsigned;
};
template <>
struct AtomicValue<unsigned long long> {
  using Type = unsigned long long;
};

template <typename Pointer>
struct AtomicTarget {};
template <typename T>
struct AtomicTarget<T*> : AtomicValue<T> {
  static Place place(T* p) { return {nullptr, reinterpret_cast<std::uintptr_t>(p)}; }
};
template <typename Pointer>
struct AtomicClass : AtomicValue<typename Pointer::Value> {
  static Place place(const Pointer& p) { return p.place(); }
};
template <typename T>
struct AtomicTarget<bnorm_ext::cuda::Shared<T>> : AtomicClass<bnorm_ext::cuda::Shared<T>> {};
template <typename T>
struct AtomicTarget<bnorm_ext::cuda::Distributed<T>>
    : AtomicClass<bnorm_ext::cuda::Distributed<T>> {};
template <typename T>
struct AtomicTarget<bnorm_ext::cuda::Workspace<T>> : AtomicClass<bnorm_ext::cuda::Workspace<T>> {};

// Returns the old value; `update` returns the new one. `update` clears its second argument if it
// writes nothing, as a compare-and-swap that fails does: then nothing is published either.
template <typename Pointer, typename Update>
typename AtomicTarget<Pointer>::Type atomic(const Pointer& p, Update update) {
  using T = typename AtomicTarget<Pointer>::Type;
  const Place place = AtomicTarget<Pointer>::place(p);
  void* memory = atomic_begin(place, sizeof(T));
  if (memory == nullptr) return T{};
  T before;
  std::memcpy(&before, memory, sizeof(T));
  bool wrote = true;
  const T after = update(before, wrote);
  if (wrote) std::memcpy(memory, &after, sizeof(T));
  atomic_end(place, sizeof(T), wrote);
  return before;
}

}  // namespace detail
}  // namespace emulator

#define EMULATOR_ATOMIC(name, expression)                                        \
  template <typename Pointer>                                                    \
  typename emulator::detail::AtomicTarget<Pointer>::Type name(                   \
      Pointer p, typename emulator::detail::AtomicTarget<Pointer>::Type value) { \
    using T = typename emulator::detail::AtomicTarget<Pointer>::Type;            \
    return emulator::detail::atomic(                                             \
        p, [value](T before, bool&) { return static_cast<T>(expression); });     \
  }
// Signed sums wrap around, as on the hardware.
EMULATOR_ATOMIC(atomicAdd,
                static_cast<unsigned long long>(before) + static_cast<unsigned long long>(value))
EMULATOR_ATOMIC(atomicSub,
                static_cast<unsigned long long>(before) - static_cast<unsigned long long>(value))
EMULATOR_ATOMIC(atomicExch, (static_cast<void>(before), value))
EMULATOR_ATOMIC(atomicMin, value < before ? value : before)
EMULATOR_ATOMIC(atomicMax, before < value ? value : before)
EMULATOR_ATOMIC(atomicOr, before | value)
EMULATOR_ATOMIC(atomicAnd, before& value)
EMULATOR_ATOMIC(atomicXor, before ^ value)
EMULATOR_ATOMIC(atomicInc, before >= value ? 0 : before + 1)
EMULATOR_ATOMIC(atomicDec, before == 0 || before > value ? value : before - 1)
#undef EMULATOR_ATOMIC

template <typename Pointer>
typename emulator::detail::AtomicTarget<Pointer>::Type atomicCAS(
    Pointer p, typename emulator::detail::AtomicTarget<Pointer>::Type compare,
    typename emulator::detail::AtomicTarget<Pointer>::Type value) {
  using T = typename emulator::detail::AtomicTarget<Pointer>::Type;
  return emulator::detail::atomic(p, [compare, value](T before, bool& wrote) {
    wrote = before == compare;
    return wrote ? value : before;
  });
}
