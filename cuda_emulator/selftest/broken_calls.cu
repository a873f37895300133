// Kernels with one error each, in collective calls and in accesses to tensors.
// reports.py says what each must be reported for.
#include "selftest.h"

namespace {

using bnorm_ext::cuda::dynamic_shared;

// ---- Barriers ----

__global__ void barrier_after_exit(Params) {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void barriers_of_two_kinds(Params) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads_or(1);
  }
}

__global__ void barrier_against_shuffle(Params) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// ---- Shuffles and votes ----

__global__ void lane_outside_mask(Params) {
  if (threadIdx.x % 32 < 16) __shfl_down_sync(0xffffu, 1.0f, 1);
}

__global__ void mask_without_caller(Params) {
  __shfl_xor_sync(0x7fffffffu, 1.0f, 1);
}

__global__ void mask_with_exited(Params) {
  if (threadIdx.x == 37) return;
  __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void masks_differ(Params) {
  const unsigned lane = threadIdx.x % 32;
  __syncwarp(lane < 8 ? 0xffu : ~0u);
}

__global__ void operations_differ(Params) {
  if (threadIdx.x % 2 == 0) {
    __shfl_xor_sync(~0u, 1, 1);
  } else {
    __any_sync(~0u, 1);
  }
}

__global__ void types_differ(Params) {
  if (threadIdx.x % 2 == 0) {
    __shfl_xor_sync(~0u, 1.0f, 1);
  } else {
    __shfl_xor_sync(~0u, 1.0, 1);
  }
}

__global__ void lanes_missing(Params) {
  __syncwarp();
}

__global__ void width_of_three(Params) {
  __shfl_down_sync(~0u, 1, 1, 3);
}

// Correct by the default rules, wrong by those of CUDA: shuffles do not order memory.
__global__ void shuffle_for_barrier(Params) {
  const auto slot = dynamic_shared<float>(0);
  slot[threadIdx.x] = 1.0f;
  __shfl_sync(~0u, 0, 0);
  const float v = slot[threadIdx.x ^ 1];
  static_cast<void>(v);
}

// ---- Tensors ----

__device__ void copy(Params p, int n) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int i = at; i < n; i += static_cast<int>(gridDim.x * blockDim.x)) store_float(p.out + i, 0);
}

__global__ void tail_too_long(Params p) {
  copy(p, static_cast<int>(gridDim.x) * p.per_block + 1);
}

__global__ void tail_too_short(Params p) {
  copy(p, static_cast<int>(gridDim.x) * p.per_block - 1);
}

__global__ void written_twice(Params p) {
  copy(p, static_cast<int>(gridDim.x) * p.per_block);
  if (blockIdx.x == 2 && threadIdx.x == 9) store_float(p.out + 100, 0);
}

__global__ void plain_tail(Params p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) p.plain[gridDim.x * p.per_block] = 1;
}

__global__ void misaligned_load(Params p) {
  if (threadIdx.x == 3) bnorm_ext::cuda::load_bytes<16>(p.in + 2);
}

__global__ void load_outside(Params p) {
  if (threadIdx.x == 3) bnorm_ext::cuda::load_bytes<4>(p.in - 1);
}

__global__ void prefetch_outside(Params p) {
  if (threadIdx.x == 3) bnorm_ext::cuda::prefetch(p.in - 1);
}

__global__ void store_to_input(Params p) {
  if (threadIdx.x == 4) store_float(const_cast<float*>(p.in), 1);
}

// Another name than the symbol's, and a parameter list with templates.
template <int kValue>
__global__ void in_a_template(Params p) {
  if (threadIdx.x == 1) bnorm_ext::cuda::load_bytes<16>(p.in + kValue);
}

}  // namespace

void add_broken_calls(std::vector<Case>& cases) {
#define ADD(kernel) cases.push_back({#kernel, run_sums(kernel, {}, kAnything)})
#define ADD_WRITER(kernel) cases.push_back({#kernel, run_sums(kernel, {}, kWritten)})
  ADD(barrier_after_exit);
  ADD(barriers_of_two_kinds);
  ADD(barrier_against_shuffle);
  ADD(lane_outside_mask);
  ADD(mask_without_caller);
  ADD(mask_with_exited);
  ADD(masks_differ);
  ADD(operations_differ);
  ADD(types_differ);
  ADD(width_of_three);
  ADD_WRITER(tail_too_long);
  ADD_WRITER(tail_too_short);
  ADD_WRITER(written_twice);
  ADD(plain_tail);
  ADD(misaligned_load);
  ADD(load_outside);
  ADD(prefetch_outside);
  ADD(store_to_input);
  ADD(in_a_template<3>);
#undef ADD
#undef ADD_WRITER
  Options odd;
  odd.threads = 48;
  cases.push_back({"lanes_missing", run_sums(lanes_missing, odd, kAnything)});
  const Run run = run_sums(shuffle_for_barrier, {}, kAnything);
  cases.push_back({"shuffle_for_barrier", [run] {
                     emulator::set_shuffles_order_memory(false);
                     return run();
                   }});
}
