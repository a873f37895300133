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

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

// Beside each PTX instruction stands the guarantee of the PTX ISA that the kernels rely on.

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

// The same number, of which the compiler knows nothing: it and what is computed from it are computed
// here, rather than earlier and kept in registers.
__device__ __forceinline__ int computed_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
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

// The same for what nobody reads again: of the lines in the L2, these give way first. Guarantee: .cs
// changes how a line is cached ("likely accessed once"), not what is loaded.
template <int kBytes>
__device__ __forceinline__ Bytes<kBytes> load_bytes_evict_first(const void* p) {
  if constexpr (kBytes == 16) {
    const uint4 all = __ldcs(static_cast<const uint4*>(p));
    return {{all.x, all.y, all.z, all.w}};
  } else {
    return load_bytes<kBytes>(p);  // lines of narrow accesses are read by several instructions
  }
}
template <int kBytes>
__device__ __forceinline__ void store_bytes(void* p, Bytes<kBytes> value) {
  if constexpr (kBytes == 16) {
    // Of an assignment the compiler makes four stores of a word in some loops.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(p) = {value.word[0], value.word[1]};
  } else {
    *static_cast<Bytes<kBytes>*>(p) = value;
  }
}

// The same for what nobody reads soon: of the lines in the L2, these give way first. Guarantee: .cs
// changes how a line is cached ("likely accessed once"), not what is stored.
template <int kBytes>
__device__ __forceinline__ void store_bytes_evict_first(void* p, Bytes<kBytes> value) {
  if constexpr (kBytes == 16) {
    __stcs(static_cast<uint4*>(p),
           make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
  } else if constexpr (kBytes == 8) {
    __stcs(static_cast<uint2*>(p), make_uint2(value.word[0], value.word[1]));
  } else if constexpr (kBytes == 4) {
    __stcs(static_cast<unsigned*>(p), value.word[0]);
  } else if constexpr (kBytes == 2) {
    __stcs(static_cast<unsigned short*>(p), value.word[0]);
  } else {
    __stcs(static_cast<unsigned char*>(p), value.word[0]);
  }
}

// ---- Arithmetic -------------------------------------------------------------------------------

// 1 / d for 1 <= d <= 2, or NaN for NaN. Guarantee: rcp.approx is off by at most a unit in the last
// place. .ftz flushes subnormal numbers, of which there are none here, and saves their handling.
__host__ __device__ __forceinline__ float reciprocal_estimate(float d) {
#if defined(__CUDA_ARCH__)
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(d));
  return estimate;
#else
  return 1.0f / d;  // for the compiler: the formulas of the activations are host functions too
#endif
}

// Two values rounded to 16 bits, `low` in the lower half of the word. Guarantee: .rn rounds to nearest
// even; where the two are converted by one instruction, `a` is the upper half.
__device__ __forceinline__ unsigned round_to_pair(float low, float high, c10::BFloat16) {
#if __CUDA_ARCH__ >= 800
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return unsigned{c10::BFloat16(low).x} | unsigned{c10::BFloat16(high).x} << 16;
#endif
}
__device__ __forceinline__ unsigned round_to_pair(float low, float high, c10::Half) {
#if __CUDA_ARCH__ >= 800
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return unsigned{c10::Half(low).x} | unsigned{c10::Half(high).x} << 16;
#endif
}

// ---- Synchronisation between blocks -----------------------------------------------------------

// Reads a word that other blocks change by atomics. Guarantee: an acquire load that sees a value
// which was written after a __threadfence orders all that came before that fence before all that
// comes after this load, at the scope of the device; __syncthreads extends it to the other threads
// of the block. It is not served from a stale line of the L1, so that a loop over it ends. Unlike
// an atomic it writes nothing: blocks that wait do not queue behind each other in the L2.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Starts to bring the cache line of p into the L2, and waits for nothing.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// ---- Asynchronous copies (sm_80 and newer) -----------------------------------------------------

// Starts a copy of 16 bytes into shared memory; both addresses must be multiples of 16. This thread
// may read the bytes after async_wait, the other threads of the block after a barrier that follows.
// Guarantee: cp.async writes all 16 bytes before the wait_group of its group returns, and is a weak
// access: nothing orders it before that. .cg leaves no copy in the L1.
template <typename T>
__device__ __forceinline__ void async_copy16(Shared<T> to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

// Closes the current group of this thread's copies. Guarantee: the group has all copies that the
// thread started since the last one, perhaps none.
__device__ __forceinline__ void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's newest groups are still in flight. Guarantee: the
// groups before them are complete, and their writes are visible to this thread.
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
