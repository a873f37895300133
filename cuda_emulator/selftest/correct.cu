// Correct kernels. Each sums or moves `n` floats, with one of the ways of communication between
// threads that the library's kernels use.
#include "selftest.h"

namespace {

using bnorm_ext::cuda::dynamic_shared;
using bnorm_ext::cuda::Shared;

// ---- Shuffles, and shared memory between warps ----

__device__ double warp_sum(double v) {
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_xor_sync(~0u, v, delta);
  return v;
}

__device__ double block_sum(Shared<double> scratch, double v) {
  v = warp_sum(v);
  const int warps = static_cast<int>(blockDim.x) / warpSize;
  const int warp = static_cast<int>(threadIdx.x) / warpSize;
  if (threadIdx.x % warpSize == 0) scratch[warp] = v;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < warps; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(128) block_reduction(Params p) {
  const auto scratch = dynamic_shared<double>(0);
  const int base = static_cast<int>(blockIdx.x) * p.per_block;
  double sum = 0;
  for (int i = threadIdx.x; i < p.per_block; i += blockDim.x) sum += p.in[base + i];
  sum = block_sum(scratch, sum);
  if (threadIdx.x == 0) store_float(p.out + blockIdx.x, static_cast<float>(sum));
}

// ---- A semaphore: the last block merges ----

__global__ void last_block(Params p) {
  const auto scratch = dynamic_shared<double>(0);
  const auto last = dynamic_shared<int>(256);
  const int base = static_cast<int>(blockIdx.x) * p.per_block;
  double sum = 0;
  for (int i = threadIdx.x; i < p.per_block; i += blockDim.x) sum += p.in[base + i];
  sum = block_sum(scratch, sum);
  if (threadIdx.x == 0) {
    p.partial[blockIdx.x] = sum;
    __threadfence();
    const unsigned semaphore = atomicInc(p.semaphore, gridDim.x - 1);
    __threadfence();
    last[0] = semaphore == gridDim.x - 1;
  }
  __syncthreads();
  const int merge = last[0];
  if (merge == 0) return;
  double all = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) all += p.partial[i];
  all = block_sum(scratch, all);
  if (threadIdx.x == 0) store_float(p.out, static_cast<float>(all));
}

// ---- Distributed shared memory ----

__global__ void cluster_reduction(Params p) {
  const auto mine = dynamic_shared<double>(0);
  const auto scratch = dynamic_shared<double>(16);
  const int base = static_cast<int>(blockIdx.x) * p.per_block;
  double sum = 0;
  for (int i = threadIdx.x; i < p.per_block; i += blockDim.x) sum += p.in[base + i];
  sum = block_sum(scratch, sum);
  if (threadIdx.x == 0) mine[0] = sum;
  bnorm_ext::cuda::cluster_sync();
  if (bnorm_ext::cuda::cluster_rank() == 0 && threadIdx.x == 0) {
    double all = 0;
    for (unsigned r = 0; r < bnorm_ext::cuda::cluster_size(); ++r) {
      const double part = bnorm_ext::cuda::in_block(mine, r)[0];
      all += part;
    }
    store_float(p.out + blockIdx.x / bnorm_ext::cuda::cluster_size(), static_cast<float>(all));
  }
  bnorm_ext::cuda::cluster_sync();
}

// ---- A cooperative grid ----

__global__ void grid_sum(Params p) {
  const auto scratch = dynamic_shared<double>(0);
  const int base = static_cast<int>(blockIdx.x) * p.per_block;
  double sum = 0;
  for (int i = threadIdx.x; i < p.per_block; i += blockDim.x) sum += p.in[base + i];
  sum = block_sum(scratch, sum);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
  bnorm_ext::cuda::grid_sync();
  double all = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) all += p.partial[i];
  for (int i = threadIdx.x; i < p.per_block; i += blockDim.x) {
    store_float(p.out + base + i, static_cast<float>(all));
  }
}

// ---- Asynchronous copies into two buffers in turn ----

__global__ void double_buffer(Params p) {
  const auto tile = dynamic_shared<float>(0);
  const int thread = static_cast<int>(threadIdx.x);
  const int floats = static_cast<int>(blockDim.x) * 4;
  const int base = static_cast<int>(blockIdx.x) * p.per_block;
  const int tiles = p.per_block / floats;
  bnorm_ext::cuda::async_copy16(tile + thread * 4, p.in + base + thread * 4);
  bnorm_ext::cuda::async_commit();
  for (int i = 0; i < tiles; ++i) {
    const int next = (i + 1) % 2 * floats;
    if (i + 1 < tiles) {
      bnorm_ext::cuda::async_copy16(tile + (next + thread * 4),
                                    p.in + base + (i + 1) * floats + thread * 4);
    }
    bnorm_ext::cuda::async_commit();
    bnorm_ext::cuda::async_wait<1>();
    __syncthreads();
    // Reads elements that other threads fetched, in reverse order.
    for (int j = 0; j < 4; ++j) {
      const int from = floats - 1 - (j * static_cast<int>(blockDim.x) + thread);
      const float v = tile[i % 2 * floats + from];
      store_float(p.out + base + i * floats + floats - 1 - from, v);
    }
    __syncthreads();
  }
}

// ---- Votes, parts of warps, and the other barriers ----

__global__ void votes(Params p) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  const int any = __any_sync(~0u, lane == 7);
  const int all = __all_sync(~0u, lane < 32);
  // Half-warps diverge, and synchronise among themselves.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  int v = static_cast<int>(lane);
  if (lane < 16) {
    v = __shfl_down_sync(half, v, 1, 16);
  } else {
    v = __shfl_up_sync(half, v, 1, 16);
  }
  const int lanes = __syncthreads_count(v > 16);
  const int some = __syncthreads_or(threadIdx.x == 3);
  const int every = __syncthreads_and(threadIdx.x != 3);
  const bool right = odd == 0xaaaaaaaau && any == 1 && all == 1 && some != 0 && every == 0 &&
                     v == (lane < 15                  ? static_cast<int>(lane) + 1
                           : lane == 15 || lane == 16 ? static_cast<int>(lane)
                                                      : static_cast<int>(lane) - 1) &&
                     lanes == static_cast<int>(blockDim.x) / 32 * 14;
  store_float(p.out + blockIdx.x * blockDim.x + threadIdx.x, right ? 1.0f : 0.0f);
}

// ---- Lanes communicate through shared memory, ordered by __syncwarp of some lanes ----

__global__ void syncwarp_pairs(Params p) {
  const auto slot = dynamic_shared<float>(0);
  const unsigned lane = threadIdx.x % 32;
  const unsigned quad = 0xfu << lane / 4 * 4;
  slot[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp(quad);
  const float v = slot[threadIdx.x ^ 3];
  store_float(p.out + threadIdx.x, v);
}

}  // namespace

void add_correct(std::vector<Case>& cases) {
  cases.push_back({"block_reduction", run_sums(block_reduction, {}, kPerBlock)});
  cases.push_back({"last_block", run_sums(last_block, {}, kTotal)});
  Options cluster;
  cluster.cluster = 4;
  cases.push_back({"cluster_reduction", run_sums(cluster_reduction, cluster, kPerCluster)});
  Options cooperative;
  cooperative.cooperative = true;
  cases.push_back({"grid_sum", run_sums(grid_sum, cooperative, kTotalEverywhere)});
  cases.push_back({"double_buffer", run_sums(double_buffer, {}, kCopy)});
  cases.push_back({"votes", run_sums(votes, {}, kOnes)});
  Options one_block;
  one_block.blocks = 1;
  one_block.per_block = 128;
  cases.push_back({"syncwarp_pairs", run_sums(syncwarp_pairs, one_block, kQuads)});
}
