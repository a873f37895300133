// Values in slots, and instructions that compute a value from values.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kinds.h"

namespace emulator {
namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Of the low bytes of a slot.
template <typename T>
struct Value {
  static T from(u64 slot) { return static_cast<T>(slot); }
  static u64 to(T value) { return static_cast<u64>(value); }
};
template <>
struct Value<bool> {  // a predicate
  static bool from(u64 slot) { return (slot & 1) != 0; }
  static u64 to(bool value) { return value; }
};
template <>
struct Value<float> {
  static float from(u64 slot) { return same_bits<float>(static_cast<u32>(slot)); }
  // Of NaNs, GPUs return one in float32, and keep the bits of an operand in float64.
  static u64 to(float value) { return value != value ? 0x7fffffffu : same_bits<u32>(value); }
};
template <>
struct Value<double> {
  static double from(u64 slot) { return same_bits<double>(slot); }
  static u64 to(double value) { return same_bits<u64>(value); }
};

// The instruction that applies a function to its operands: Operation<add<float>>.
template <auto function>
struct Operation;
template <typename Result, typename... Operands, Result (*function)(Operands...)>
struct Operation<function> {
  static const Instruction* execute(const Instruction* at, Frame& frame) {
    return execute(at, frame, std::index_sequence_for<Operands...>());
  }
  template <std::size_t... i>
  static const Instruction* execute(const Instruction* at, Frame& frame,
                                    std::index_sequence<i...>) {
    u64* slots = frame.slots;
    slots[at->result[0]] =
        Value<Result>::to(function(Value<Operands>::from(slots[at->operand[i]])...));
    return at + 1;
  }
  static constexpr int kOperands = sizeof...(Operands);
};

template <auto function>
void add_operation(std::vector<Kind>& kinds, const std::string& name) {
  using O = Operation<function>;
  kinds.push_back({name, Form::kValues, &O::execute, O::kOperands});
}

// Comparisons of integers and of floating-point numbers; false if one operand is a NaN.
template <typename T>
bool eq(T a, T b) {
  return a == b;
}
template <typename T>
bool lt(T a, T b) {
  return a < b;
}
template <typename T>
bool le(T a, T b) {
  return a <= b;
}
template <typename T>
bool gt(T a, T b) {
  return a > b;
}
template <typename T>
bool ge(T a, T b) {
  return a >= b;
}

}  // namespace ptx
}  // namespace emulator
