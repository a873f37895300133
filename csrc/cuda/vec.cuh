// The only vector loads and stores, and the conversion of element types.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../params.h"
#include "platform.cuh"

namespace bnorm_ext {
namespace cuda {

// kWidth values as they are in memory, loaded and stored in one access; p must be a multiple of
// kWidth * sizeof(T) bytes. 16-bit values stay packed, which halves the registers, and are
// converted one by one when they are used.
template <typename T, int kWidth>
class Values {
 public:
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16, "one access of 16 bytes, or one value");

  __device__ __forceinline__ Values() {}
  // evict_first: what is loaded gives way first in the L2
  __device__ __forceinline__ void load(const T* p, bool evict_first = false) {
    constexpr int kBytes = kWidth * sizeof(T);
    bytes_ = evict_first ? load_bytes_evict_first<kBytes>(p) : load_bytes<kBytes>(p);
  }
  __device__ __forceinline__ void take(uint4 all) {
    static_assert(sizeof(bytes_) == sizeof(all), "");
    bytes_ = {{all.x, all.y, all.z, all.w}};
  }
  __device__ __forceinline__ void take(const Bytes<kWidth * sizeof(T)>& all) { bytes_ = all; }
  // evict_first: what is stored gives way first in the L2
  __device__ __forceinline__ void store(T* p, bool evict_first = false) const {
    if (evict_first) {
      store_bytes_evict_first<kWidth * sizeof(T)>(p, bytes_);
    } else {
      store_bytes<kWidth * sizeof(T)>(p, bytes_);
    }
  }

  __device__ __forceinline__ Acc<T> operator[](int v) const {
    if constexpr (kPacked) {
      const auto half = static_cast<uint16_t>(bytes_.word[v / 2] >> v % 2 * 16);
      return static_cast<Acc<T>>(T(half, T::from_bits()));
    } else {
      T value;
      memcpy(&value, bytes_.word + v * kWords, sizeof(T));
      return static_cast<Acc<T>>(value);
    }
  }
  // Each value is rounded to T once.
  __device__ __forceinline__ void set(const Acc<T> (&values)[kWidth]) {
    if constexpr (kPacked) {
#pragma unroll
      for (int v = 0; v < kWidth; v += 2) {
        bytes_.word[v / 2] = round_to_pair(values[v], values[v + 1], T());
      }
    } else {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const T rounded = static_cast<T>(values[v]);
        memcpy(bytes_.word + v * kWords, &rounded, sizeof(T));
      }
    }
  }

 private:
  static constexpr bool kPacked = kWidth > 1 && sizeof(T) == 2;  // two values in a word
  static constexpr int kWords = sizeof(T) > 4 ? static_cast<int>(sizeof(T)) / 4 : 1;  // of a value
  Bytes<kWidth * sizeof(T)> bytes_;
};

template <typename T>
__device__ __forceinline__ Acc<T> load_one(const T* p) {
  Values<T, 1> value;
  value.load(p);
  return value[0];
}

template <typename T>
__device__ __forceinline__ void store_one(T* p, Acc<T> value) {
  Values<T, 1> rounded;
  const Acc<T> values[] = {value};
  rounded.set(values);
  rounded.store(p);
}

// False for infinities and NaN.
__device__ __forceinline__ bool is_finite(double a) {
  return a - a == 0.0;
}

}  // namespace cuda
}  // namespace bnorm_ext
