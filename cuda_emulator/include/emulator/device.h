// The built-in variables and functions of device code: indices, barriers, shuffles, votes, fences.
#pragma once

#include <type_traits>

#include "runtime.h"

// Of the running thread; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads() {
  emulator::detail::block_barrier(emulator::detail::Where::kSyncthreads, 0);
}
inline int __syncthreads_or(int predicate) {
  return emulator::detail::block_barrier(emulator::detail::Where::kSyncthreadsOr, predicate);
}
inline int __syncthreads_and(int predicate) {
  return emulator::detail::block_barrier(emulator::detail::Where::kSyncthreadsAnd, predicate);
}
inline int __syncthreads_count(int predicate) {
  return emulator::detail::block_barrier(emulator::detail::Where::kSyncthreadsCount, predicate);
}

inline void __syncwarp(unsigned mask = ~0u) {
  emulator::detail::warp_collective(emulator::detail::Where::kSyncwarp, mask, 0, 32, 0, nullptr,
                                    nullptr);
}

namespace emulator {
namespace detail {

template <typename T>
T shuffle(Where where, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles exist for scalars of 4 and 8 bytes");
  T result;
  warp_collective(where, mask, argument, width, sizeof(T), &value, &result);
  return result;
}

inline unsigned vote(Where where, unsigned mask, int predicate) {
  unsigned result;
  const unsigned value = predicate != 0;
  warp_collective(where, mask, 0, 32, sizeof(value), &value, &result);
  return result;
}

}  // namespace detail
}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::detail::shuffle(emulator::detail::Where::kShfl, mask, value, lane, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulator::detail::shuffle(emulator::detail::Where::kShflXor, mask, value, lane_mask,
                                   width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::detail::shuffle(emulator::detail::Where::kShflDown, mask, value,
                                   static_cast<int>(delta), width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::detail::shuffle(emulator::detail::Where::kShflUp, mask, value,
                                   static_cast<int>(delta), width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::detail::vote(emulator::detail::Where::kBallot, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::detail::vote(emulator::detail::Where::kAny, mask, predicate));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::detail::vote(emulator::detail::Where::kAll, mask, predicate));
}
inline unsigned __activemask() {
  return emulator::detail::active_mask();
}

inline void __threadfence() {
  emulator::detail::fence(true);
}
inline void __threadfence_block() {
  emulator::detail::fence(false);
}

// Time does not pass here: others run.
inline void __nanosleep(unsigned) {
  emulator::detail::sleep();
}

template <typename T>
T __ldg(const T* p) {
  T value;
  emulator::detail::tensor_read(p, &value, sizeof(T));
  return value;
}
