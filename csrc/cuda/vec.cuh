// The only aligned vector load and store, and what element types mean.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// What values of type T are accumulated and computed in.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

// kWidth values from p in one access; p is a multiple of kWidth * sizeof(T) bytes.
template <int kWidth, typename T>
__device__ __forceinline__ void load(const T* p, Acc<T> (&out)[kWidth]) {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16, "one access of 16 bytes, or one value");
  union Values {
    Bytes<kWidth * sizeof(T)> bytes;
    T value[kWidth];
    __device__ Values() {}
  } u;
  u.bytes = load_bytes<kWidth * sizeof(T)>(p);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) out[v] = static_cast<Acc<T>>(u.value[v]);
}

// Rounds to T, once.
template <int kWidth, typename T>
__device__ __forceinline__ void store(T* p, const Acc<T> (&value)[kWidth]) {
  union Values {
    Bytes<kWidth * sizeof(T)> bytes;
    T value[kWidth];
    __device__ Values() {}
  } u;
#pragma unroll
  for (int v = 0; v < kWidth; ++v) u.value[v] = static_cast<T>(value[v]);
  store_bytes<kWidth * sizeof(T)>(p, u.bytes);
}

template <typename T>
__device__ __forceinline__ Acc<T> load_one(const T* p) {
  Acc<T> value[1];
  load<1>(p, value);
  return value[0];
}

template <typename T>
__device__ __forceinline__ void store_one(T* p, Acc<T> value) {
  const Acc<T> values[1] = {value};
  store<1>(p, values);
}

// False for infinities and NaN.
__device__ __forceinline__ bool is_finite(double a) {
  return a - a == 0.0;
}

}  // namespace cuda
}  // namespace bnorm_ext
