// CUDA's keywords as macros, and its built-in vector types.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define EMULATOR_VECTOR_TYPES(Name, Scalar)                                   \
  struct Name##1 {                                                            \
    Scalar x;                                                                 \
  };                                                                          \
  struct alignas(2 * sizeof(Scalar)) Name##2 {                                \
    Scalar x, y;                                                              \
  };                                                                          \
  struct Name##3 {                                                            \
    Scalar x, y, z;                                                           \
  };                                                                          \
  struct alignas(4 * sizeof(Scalar) < 16 ? 4 * sizeof(Scalar) : 16) Name##4 { \
    Scalar x, y, z, w;                                                        \
  };                                                                          \
  inline Name##1 make_##Name##1(Scalar x) {                                   \
    return {x};                                                               \
  }                                                                           \
  inline Name##2 make_##Name##2(Scalar x, Scalar y) {                         \
    return {x, y};                                                            \
  }                                                                           \
  inline Name##3 make_##Name##3(Scalar x, Scalar y, Scalar z) {               \
    return {x, y, z};                                                         \
  }                                                                           \
  inline Name##4 make_##Name##4(Scalar x, Scalar y, Scalar z, Scalar w) {     \
    return {x, y, z, w};                                                      \
  }
EMULATOR_VECTOR_TYPES(char, signed char)
EMULATOR_VECTOR_TYPES(uchar, unsigned char)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(ushort, unsigned short)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(uint, unsigned int)
EMULATOR_VECTOR_TYPES(longlong, long long)
EMULATOR_VECTOR_TYPES(ulonglong, unsigned long long)
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(double, double)
#undef EMULATOR_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
