// Arithmetic that CUDA declares in the global namespace.
#pragma once

#include <math.h>

#include <cstring>
#include <type_traits>

// As in CUDA: two numbers of any types, compared in their common type. If one is a NaN, the result
// is the other.
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_integral<T>::value) {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  } else {
    return static_cast<T>(fmin(static_cast<T>(a), static_cast<T>(b)));
  }
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_integral<T>::value) {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  } else {
    return static_cast<T>(fmax(static_cast<T>(a), static_cast<T>(b)));
  }
}

inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
inline float rsqrt(float x) {
  return rsqrtf(x);
}

inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return sqrtf(a);
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dsub_rn(double a, double b) {
  return a - b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline double __dsqrt_rn(double a) {
  return sqrt(a);
}
inline double __drcp_rn(double a) {
  return 1.0 / a;
}

inline float __double2float_rn(double a) {
  return static_cast<float>(a);
}
inline int __double2int_rn(double a) {
  return static_cast<int>(nearbyint(a));
}
inline int __float2int_rn(float a) {
  return static_cast<int>(nearbyintf(a));
}
inline int __float2int_rz(float a) {
  return static_cast<int>(a);
}
inline float __int2float_rn(int a) {
  return static_cast<float>(a);
}
inline double __int2double_rn(int a) {
  return static_cast<double>(a);
}
inline float __uint2float_rn(unsigned a) {
  return static_cast<float>(a);
}
inline double __uint2double_rn(unsigned a) {
  return static_cast<double>(a);
}
inline double __ll2double_rn(long long a) {
  return static_cast<double>(a);
}

namespace emulator {
namespace detail {
template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail
}  // namespace emulator

inline unsigned __float_as_uint(float a) {
  return emulator::detail::same_bits<unsigned>(a);
}
inline int __float_as_int(float a) {
  return emulator::detail::same_bits<int>(a);
}
inline float __uint_as_float(unsigned a) {
  return emulator::detail::same_bits<float>(a);
}
inline float __int_as_float(int a) {
  return emulator::detail::same_bits<float>(a);
}
inline long long __double_as_longlong(double a) {
  return emulator::detail::same_bits<long long>(a);
}
inline double __longlong_as_double(long long a) {
  return emulator::detail::same_bits<double>(a);
}

inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1u) << (31 - i);
  return reversed;
}
inline int __popc(unsigned a) {
  return __builtin_popcount(a);
}
inline int __popcll(unsigned long long a) {
  return __builtin_popcountll(a);
}
inline int __clz(int a) {
  return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a));
}
inline int __clzll(long long a) {
  return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a));
}
inline int __ffs(int a) {
  return __builtin_ffs(a);
}
inline int __ffsll(long long a) {
  return __builtin_ffsll(a);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
