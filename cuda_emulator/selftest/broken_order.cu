// Kernels with one error each, in communication between threads: order, barriers, masks.
// reports.py says what each must be reported for.
#include "selftest.h"

namespace {

using bnorm_ext::cuda::dynamic_shared;
using bnorm_ext::cuda::Shared;

// ---- Shared memory ----

__global__ void missing_barrier(Params) {
  const auto slot = dynamic_shared<double>(0);
  slot[threadIdx.x] = threadIdx.x;
  const double v = slot[threadIdx.x ^ 32];
  slot[128 + threadIdx.x] = v;
}

// A second round overwrites what slow threads still read in the first.
__global__ void missing_second_barrier(Params) {
  const auto slot = dynamic_shared<float>(0);
  for (int round = 0; round < 2; ++round) {
    slot[threadIdx.x] = 1.0f;
    __syncthreads();
    const float v = slot[threadIdx.x ^ 64];
    static_cast<void>(v);
  }
}

__global__ void unwritten_shared(Params) {
  const auto slot = dynamic_shared<double>(0);
  if (threadIdx.x < 127) slot[threadIdx.x] = 1;
  __syncthreads();
  const double v = slot[127];
  static_cast<void>(v);
}

__global__ void shared_outside(Params) {
  const auto slot = dynamic_shared<double>(0);
  if (threadIdx.x == 5) slot[8192 / sizeof(double)] = 1;
}

__global__ void shared_misaligned(Params) {
  if (threadIdx.x == 6) dynamic_shared<double>(12)[0] = 1;
}

// Different threads write the halves of one word; each reads its neighbour's half.
__global__ void half_word(Params) {
  const auto slot = dynamic_shared<unsigned short>(0);
  slot[threadIdx.x] = 1;
  __syncwarp();
  if (threadIdx.x == 31) {
    const unsigned short v = slot[32];
    static_cast<void>(v);
  }
}

// ---- Order between blocks ----

__device__ void semaphore_merge(Params p, bool release, bool acquire, unsigned last_semaphore) {
  const auto last = dynamic_shared<int>(0);
  if (threadIdx.x == 0) {
    p.partial[blockIdx.x] = 1.0;
    if (release) __threadfence();
    const unsigned semaphore = atomicInc(p.semaphore, gridDim.x - 1);
    if (acquire) __threadfence();
    last[0] = semaphore == last_semaphore;
  }
  __syncthreads();
  const int merge = last[0];
  if (merge == 0) return;
  if (threadIdx.x == 33) {
    double all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += p.partial[i];
    store_float(p.out, static_cast<float>(all));
  }
}
__global__ void dropped_fence(Params p) {
  semaphore_merge(p, false, true, gridDim.x - 1);
}
__global__ void dropped_second_fence(Params p) {
  semaphore_merge(p, true, false, gridDim.x - 1);
}
__global__ void lost_merge(Params p) {
  semaphore_merge(p, true, true, gridDim.x);
}

// The fence of one thread does not publish what other threads wrote after the last barrier.
__global__ void late_write(Params p) {
  const auto last = dynamic_shared<int>(0);
  __syncthreads();
  if (threadIdx.x == 1) p.partial[blockIdx.x] = 1.0;
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicInc(p.semaphore, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  const int merge = last[0];
  if (merge == 0 || threadIdx.x != 0) return;
  double all = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) all += p.partial[i];
  store_float(p.out, static_cast<float>(all));
}

__global__ void racing_workspace(Params p) {
  if (threadIdx.x == 7) p.partial[blockIdx.x / 2] = 1.0;
}

__global__ void missing_grid_sync(Params p) {
  if (threadIdx.x == 0) p.partial[blockIdx.x] = 1.0;
  __syncthreads();
  const double v = p.partial[(blockIdx.x + 1) % gridDim.x];
  static_cast<void>(v);
  bnorm_ext::cuda::grid_sync();
}

__global__ void grid_sync_plain(Params) {
  bnorm_ext::cuda::grid_sync();
}

__global__ void spins(Params p) {
  if (threadIdx.x != 0 || blockIdx.x != 1) return;
  while (atomicAdd(p.semaphore, 0u) == 0) {
  }
}

// An acquire load, which needs no fence behind it, sees only what a fence has released.
__device__ void wait_for_flag(Params p, bool release, bool acquire) {
  if (threadIdx.x != 0 || blockIdx.x > 1) return;
  if (blockIdx.x == 0) {
    p.partial[0] = 1.0;
    if (release) __threadfence();
    atomicExch(p.semaphore, 1u);
  } else {
    while ((acquire ? bnorm_ext::cuda::load_acquire(p.semaphore) : atomicAdd(p.semaphore, 0u)) ==
           0) {
      __nanosleep(64);
    }
    const double v = p.partial[0];
    static_cast<void>(v);
  }
}
__global__ void acquired(Params p) {
  wait_for_flag(p, true, true);
}
__global__ void acquired_but_not_released(Params p) {
  wait_for_flag(p, false, true);
}
__global__ void released_but_not_acquired(Params p) {
  wait_for_flag(p, true, false);
}

// ---- Asynchronous copies ----

__global__ void missing_wait(Params p) {
  const auto tile = dynamic_shared<float>(0);
  bnorm_ext::cuda::async_copy16(tile + threadIdx.x * 4, p.in + threadIdx.x * 4);
  bnorm_ext::cuda::async_commit();
  __syncthreads();
  const float v = tile[threadIdx.x * 4];
  static_cast<void>(v);
}

// One group too many is left in flight.
__global__ void short_wait(Params p) {
  const auto tile = dynamic_shared<float>(0);
  for (int i = 0; i < 2; ++i) {
    bnorm_ext::cuda::async_copy16(tile + (i * 512 + threadIdx.x * 4), p.in + threadIdx.x * 4);
    bnorm_ext::cuda::async_commit();
  }
  bnorm_ext::cuda::async_wait<1>();
  __syncthreads();
  const float v = tile[512 + threadIdx.x];
  static_cast<void>(v);
}

__global__ void wait_without_barrier(Params p) {
  const auto tile = dynamic_shared<float>(0);
  bnorm_ext::cuda::async_copy16(tile + threadIdx.x * 4, p.in + threadIdx.x * 4);
  bnorm_ext::cuda::async_commit();
  bnorm_ext::cuda::async_wait<0>();
  if (threadIdx.x < 32) return;
  const float v = tile[(threadIdx.x ^ 32) * 4];
  static_cast<void>(v);
}

// ---- Clusters ----

__global__ void cluster_peer_exits(Params) {
  const auto slot = dynamic_shared<double>(0);
  if (threadIdx.x == 0) slot[0] = 1;
  bnorm_ext::cuda::cluster_sync();
  if (bnorm_ext::cuda::cluster_rank() == 0 && threadIdx.x == 64) {
    const double v = bnorm_ext::cuda::in_block(slot, 1)[0];
    static_cast<void>(v);
  }
}

__global__ void cluster_without_sync(Params) {
  const auto slot = dynamic_shared<double>(0);
  if (threadIdx.x == 0) slot[0] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    const double v = bnorm_ext::cuda::in_block(slot, bnorm_ext::cuda::cluster_rank() ^ 1)[0];
    static_cast<void>(v);
  }
  bnorm_ext::cuda::cluster_sync();
}

__global__ void cluster_in_plain_launch(Params) {
  bnorm_ext::cuda::cluster_sync();
}

__global__ void cluster_rank_too_high(Params) {
  const auto slot = dynamic_shared<double>(0);
  const auto there = bnorm_ext::cuda::in_block(slot, bnorm_ext::cuda::cluster_size());
  there[0] = 1;
}

}  // namespace

void add_broken_order(std::vector<Case>& cases) {
  Options cluster;
  cluster.cluster = 2;
  Options cooperative;
  cooperative.cooperative = true;
#define ADD(kernel, options) cases.push_back({#kernel, run_sums(kernel, options, kAnything)})
  ADD(missing_barrier, {});
  ADD(missing_second_barrier, {});
  ADD(unwritten_shared, {});
  ADD(shared_outside, {});
  ADD(shared_misaligned, {});
  ADD(half_word, {});
  ADD(dropped_fence, {});
  ADD(dropped_second_fence, {});
  ADD(late_write, {});
  ADD(racing_workspace, {});
  ADD(missing_grid_sync, cooperative);
  ADD(grid_sync_plain, {});
  ADD(spins, {});
  ADD(acquired, cooperative);
  ADD(acquired_but_not_released, cooperative);
  ADD(released_but_not_acquired, cooperative);
  ADD(missing_wait, {});
  ADD(short_wait, {});
  ADD(wait_without_barrier, {});
  ADD(cluster_peer_exits, cluster);
  ADD(cluster_without_sync, cluster);
  ADD(cluster_in_plain_launch, {});
  ADD(cluster_rank_too_high, cluster);
#undef ADD
  cases.push_back({"lost_merge", run_sums(lost_merge, {}, kTotal)});
}
