// What the kernels need of the platform that executes them: CUDA here, cuda_emulator/ on the CPU.
//
// Kernels use CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, atomicInc, ...) where
// they are functions, and the names below for everything else: memory for communication between
// threads, vector accesses, asynchronous copies, clusters, grid barriers. No other file of the
// kernels contains an #ifdef, inline PTX or a raw pointer into shared memory or workspace.
#pragma once

#ifdef BNORM_EXT_EMULATOR
#include <emulator.h>
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace bnorm_ext {
namespace cuda {

// ---- Memory for communication between threads -------------------------------------------------

// Whole elements are read by `T v = p[i]` and written by `p[i] = v`: the emulator records each
// access and reports races.
template <typename T>
using Shared = T*;  // of this block
template <typename T>
using Distributed = T*;  // shared memory of a block of this cluster
template <typename T>
using Workspace = T*;  // global memory that one kernel both writes and reads

// The block's dynamic shared memory from a byte offset on, which must be a multiple of alignof(T).
template <typename T>
__device__ __forceinline__ Shared<T> dynamic_shared(int byte_offset) {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes + byte_offset);
}

// A compiler barrier: values read from shared memory before it are not kept in registers but read
// again after it.
__device__ __forceinline__ void forget_loads() {
  asm volatile("" ::: "memory");
}

// ---- Vector accesses to tensors ---------------------------------------------------------------

// Whole words, so that narrower values stay packed in registers until they are used.
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

// kBytes of 1, 2, 4, 8 or 16, in one access; the address must be a multiple of kBytes.
template <int kBytes>
__device__ __forceinline__ Bytes<kBytes> load_bytes(const void* p) {
  if constexpr (kBytes == 16) {
    const uint4 all = *static_cast<const uint4*>(p);
    return {{all.x, all.y, all.z, all.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 all = *static_cast<const uint2*>(p);
    return {{all.x, all.y}};
  } else {
    return *static_cast<const Bytes<kBytes>*>(p);
  }
}
template <int kBytes>
__device__ __forceinline__ void store_bytes(void* p, Bytes<kBytes> value) {
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(p) = {value.word[0], value.word[1], value.word[2], value.word[3]};
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(p) = {value.word[0], value.word[1]};
  } else {
    *static_cast<Bytes<kBytes>*>(p) = value;
  }
}

// ---- Asynchronous copies (sm_80 and newer) -----------------------------------------------------

// Starts a copy of 16 bytes into shared memory; both addresses must be multiples of 16. This thread
// may read the bytes after async_wait, the other threads of the block after a barrier that follows.
template <typename T>
__device__ __forceinline__ void async_copy16(Shared<T> to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

// Closes the current group of this thread's copies.
__device__ __forceinline__ void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's newest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- Clusters (sm_90 and newer) and cooperative grids ------------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}

// A barrier of all threads of the cluster; orders their accesses to the shared memory of its
// blocks.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The address that corresponds to `p` in the block of that rank.
template <typename T>
__device__ __forceinline__ Distributed<T> in_block(Shared<T> p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// A barrier of all threads of a cooperative launch; orders their accesses to global memory.
__device__ __forceinline__ void grid_sync() {
  cooperative_groups::this_grid().sync();
}

}  // namespace cuda
}  // namespace bnorm_ext

#endif
