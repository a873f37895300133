// Correct kernels with less usual communication between threads: chains of flags, semaphores that
// are reset, single bytes, writes into another block's shared memory, several launches.
#include <numeric>

#include "selftest.h"

namespace {

using bnorm_ext::cuda::dynamic_shared;
using bnorm_ext::cuda::Workspace;
using emulator::Role;

struct Shape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  dim3 cluster = dim3(0);
  bool cooperative = false;
};

template <typename... Parameters, typename... Arguments>
std::string launch(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  if (shape.cluster.x > 0) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? "" : cudaGetErrorName(error);
}

template <typename T>
std::string compare(const T* is, const std::vector<T>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (is[i] == expected[i]) continue;
    return "element " + std::to_string(i) + " is " + std::to_string(is[i]) + ", not " +
           std::to_string(expected[i]);
  }
  return "";
}

// Each block waits for the flag of the block before: the last one knows what the first one wrote.
__global__ void chain(Workspace<int> sum, unsigned* flags) {
  if (threadIdx.x == 5) {
    const unsigned b = blockIdx.x;
    int before = 0;
    if (b > 0) {
      while (atomicAdd(flags + b - 1, 0u) == 0) {
      }
      __threadfence();
      before = sum[b - 1];
      const int first = sum[0];
      before += 0 * first;
    }
    sum[b] = before + static_cast<int>(b) + 1;
    __threadfence();
    atomicExch(flags + b, 1u);
  }
}

std::string run_chain() {
  int* sum = emulator::allocate<int>("sums", 12, Role::kWorkspace);
  unsigned* flags = emulator::allocate<unsigned>("flags", 12, Role::kWorkspace);
  std::memset(flags, 0, 12 * sizeof(unsigned));
  Shape shape{dim3(12), dim3(32)};
  shape.cooperative = true;  // a block waits for another: all must be there
  const std::string error = launch(shape, chain, sum, flags);
  return error.empty() ? compare(sum, {1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78}) : error;
}

// More blocks than the device holds at once; the last one resets the semaphore by a plain store.
// Launched twice.
__global__ void semaphore_set_back(Workspace<int> part, Workspace<unsigned> semaphore, int* out) {
  const auto last = dynamic_shared<int>(0);
  part[blockIdx.x * 32 + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(semaphore, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  const int merge = last[0];
  if (merge == 0) return;
  int sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * 32; i += 32) {
    const int v = part[i];
    sum += v;
  }
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(~0u, sum, delta);
  if (threadIdx.x == 0) {
    *out = sum;
    semaphore[0] = 0;
  }
}

std::string run_semaphore_set_back() {
  emulator::set_device("sm_75", 2);
  constexpr int kBlocks = 100;
  int* part = emulator::allocate<int>("parts", kBlocks * 32, Role::kWorkspace);
  unsigned* semaphore = emulator::allocate<unsigned>("semaphore", 1, Role::kWorkspace);
  int* out = emulator::allocate<int>("out", 1, Role::kPlainOutput);
  *semaphore = 0;
  for (int i = 0; i < 2; ++i) {
    *out = -1;
    const Shape shape{dim3(kBlocks), dim3(32), 16};
    const std::string error = launch(shape, semaphore_set_back, part, semaphore, out);
    if (!error.empty()) return error;
    if (*out != kBlocks * 32) return "the sum is " + std::to_string(*out);
  }
  emulator::check_outputs();
  return "";
}

// Neighbouring bytes, halves and words belong to different threads.
__global__ void small_pieces(Workspace<unsigned char> bytes, Workspace<unsigned short> halves) {
  const auto shared = dynamic_shared<unsigned char>(0);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<unsigned char>(t);
  bytes[t] = static_cast<unsigned char>(t);
  halves[t] = static_cast<unsigned short>(t);
  const unsigned char own = shared[t];
  __syncthreads();
  const unsigned char v = shared[63 - t];
  bytes[t] = static_cast<unsigned char>(v + own);
}

std::string run_small_pieces() {
  auto* bytes = emulator::allocate<unsigned char>("bytes", 64, Role::kWorkspace);
  auto* halves = emulator::allocate<unsigned short>("halves", 64, Role::kWorkspace);
  const std::string error = launch({dim3(1), dim3(64), 64}, small_pieces, bytes, halves);
  if (!error.empty()) return error;
  return compare(bytes, std::vector<unsigned char>(64, 63));
}

// Each block of the cluster writes into the next one's shared memory, in three dimensions.
__global__ void ring(int* out) {
  const auto slot = dynamic_shared<int>(0);
  const unsigned rank = bnorm_ext::cuda::cluster_rank();
  const unsigned size = bnorm_ext::cuda::cluster_size();
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  bnorm_ext::cuda::cluster_sync();
  bnorm_ext::cuda::in_block(slot, (rank + 1) % size)[t] = static_cast<int>(rank * 100 + t);
  bnorm_ext::cuda::cluster_sync();
  const int v = slot[t];
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * 24 + t] = v == static_cast<int>((rank + size - 1) % size * 100 + t);
}

std::string run_ring() {
  constexpr std::size_t kAll = 4 * 2 * 6 * 24;
  int* out = emulator::allocate<int>("out", kAll, Role::kPlainOutput);
  const Shape shape{dim3(4, 2, 6), dim3(2, 3, 4), 96, dim3(2, 1, 3)};
  const std::string error = launch(shape, ring, out);
  emulator::check_outputs();
  return error.empty() ? compare(out, std::vector<int>(kAll, 1)) : error;
}

// In place; then a launch that reads what other blocks of the launch before wrote.
__global__ void shift(float* values, Workspace<float> copy, int by) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned n = gridDim.x * blockDim.x;
  const auto bytes = bnorm_ext::cuda::load_bytes<4>(values + i);
  float v;
  std::memcpy(&v, &bytes, sizeof(v));
  store_float(values + i, v + 1);
  const unsigned from = (i + static_cast<unsigned>(by)) % n;
  if (by == 0) {
    copy[i] = v;
  } else {
    const float other = copy[from];
    store_float(values + i, other);
  }
}

std::string run_two_launches() {
  float* values = emulator::allocate<float>("values", 256, Role::kInOut);
  float* copy = emulator::allocate<float>("copy", 256, Role::kWorkspace);
  std::iota(values, values + 256, 0.0f);
  std::vector<float> expected(256);
  for (std::size_t i = 0; i < 256; ++i) expected[i] = static_cast<float>((i + 70) % 256);
  std::string error = launch({dim3(4), dim3(64)}, shift, values, copy, 0);
  if (error.empty()) error = launch({dim3(4), dim3(64)}, shift, values, copy, 70);
  return error.empty() ? compare(values, expected) : error;
}

// Atomics of all kinds on one word of shared and one of global memory; barriers order the rest.
__global__ void counters(unsigned* all, int* out) {
  const auto count = dynamic_shared<int>(0);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count, static_cast<int>(threadIdx.x));
  atomicMax(all, threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 70) out[blockIdx.x] = count[0];
}

std::string run_counters() {
  unsigned* all = emulator::allocate<unsigned>("all", 1, Role::kWorkspace);
  int* out = emulator::allocate<int>("out", 3, Role::kPlainOutput);
  *all = 0;
  const std::string error = launch({dim3(3), dim3(96), 16}, counters, all, out);
  if (*all != 95) return "the maximum is " + std::to_string(*all);
  return error.empty() ? compare(out, {4560, 4560, 4560}) : error;
}

}  // namespace

void add_exchanges(std::vector<Case>& cases) {
  cases.push_back({"chain", run_chain});
  cases.push_back({"semaphore_set_back", run_semaphore_set_back});
  cases.push_back({"small_pieces", run_small_pieces});
  cases.push_back({"ring", run_ring});
  cases.push_back({"two_launches", run_two_launches});
  cases.push_back({"counters", run_counters});
}
