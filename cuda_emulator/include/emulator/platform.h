// The names that csrc/cuda/platform.cuh defines for nvcc.
#pragma once

#include <cmath>
#include <cstring>

#include "pointers.h"
#include "runtime.h"

namespace bnorm_ext {
namespace cuda {

template <typename T>
inline Shared<T> dynamic_shared(int byte_offset) {
  emulator::detail::check_shared_offset(byte_offset, alignof(T));
  return {emulator::detail::current_block(), byte_offset};
}

inline void forget_loads() {}
inline int computed_here(int value) {
  return value;
}

template <int kBytes>
struct Bytes {
  unsigned word[kBytes / 4];
};
template <>
struct Bytes<2> {
  unsigned short word[1];
};
template <>
struct Bytes<1> {
  unsigned char word[1];
};

template <int kBytes>
inline Bytes<kBytes> load_bytes(const void* p) {
  static_assert(kBytes >= 1 && kBytes <= 16 && (kBytes & (kBytes - 1)) == 0, "");
  Bytes<kBytes> value;
  emulator::detail::tensor_read(p, &value, kBytes);
  return value;
}

template <int kBytes>
inline Bytes<kBytes> load_bytes_evict_first(const void* p) {
  return load_bytes<kBytes>(p);
}

template <int kBytes>
inline void store_bytes(void* p, Bytes<kBytes> value) {
  static_assert(kBytes >= 1 && kBytes <= 16 && (kBytes & (kBytes - 1)) == 0, "");
  emulator::detail::tensor_write(p, &value, kBytes);
}

template <int kBytes>
inline void store_bytes_evict_first(void* p, Bytes<kBytes> value) {
  static_assert(kBytes >= 1 && kBytes <= 16 && (kBytes & (kBytes - 1)) == 0, "");
  emulator::detail::tensor_write_evict_first(p, &value, kBytes);
}

template <typename T>
inline unsigned round_to_pair(float low, float high, T) {
  return unsigned{T(low).x} | unsigned{T(high).x} << 16;
}

// The worst that is allowed on a GPU: of the two floats around 1 / d, the one farther away, or
// beside 1 / d where that is a float.
inline float reciprocal_estimate(float d) {
  const float nearest = 1.0f / d;
  const bool is_low = std::fma(nearest, d, -1.0f) < 0;
  return std::nextafter(nearest, is_low ? 2.0f : 0.0f);
}

inline unsigned load_acquire(const unsigned* p) {
  return emulator::detail::load_acquire(p);
}

inline void prefetch(const void* p) {
  emulator::detail::prefetch(p);
}

template <typename T>
inline void async_copy16(Shared<T> to, const void* from) {
  emulator::detail::async_copy(to.block(), to.byte(), from);
}
inline void async_commit() {
  emulator::detail::async_commit();
}
template <int kPending>
inline void async_wait() {
  emulator::detail::async_wait(kPending);
}

inline unsigned cluster_rank() {
  return emulator::detail::cluster_rank();
}
inline unsigned cluster_size() {
  return emulator::detail::cluster_size();
}
inline void cluster_sync() {
  emulator::detail::cluster_barrier();
}

template <typename T>
inline Distributed<T> in_block(Shared<T> p, unsigned rank) {
  return {emulator::detail::block_in_cluster(rank), p.byte()};
}

inline void grid_sync() {
  emulator::detail::grid_barrier();
}

}  // namespace cuda
}  // namespace bnorm_ext
