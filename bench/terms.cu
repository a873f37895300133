// Measures what bnorm_ext/bench/static assumes of a GPU: rates of its units, copies, latencies,
// launches and barriers. Prints JSON.
//
//   nvcc -std=c++17 -O3 -arch=native bench/terms.cu -o build/terms && build/terms
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace cg = cooperative_groups;

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error_ = (call);                                                     \
    if (error_ != cudaSuccess) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error_)); \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (false)

namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 9;  // of which the median is taken
constexpr int kSteps = 4096;
constexpr int kChains = 8;  // independent operations of a thread

// Seconds of one call on a stream, the median. `prepare` is called before each, and not timed.
double seconds(
    const std::function<void()>& call, const std::function<void()>& prepare = [] {},
    cudaStream_t stream = nullptr) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> found;
  for (int i = 0; i < kSamples + 2; ++i) {
    prepare();
    CHECK(cudaEventRecord(begin, stream));
    call();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) found.push_back(ms);
  }
  std::sort(found.begin(), found.end());
  return found[kSamples / 2] * 1e-3;
}

// ---- Units: operations per clock and multiprocessor, in threads -----------------------------------

struct Fma {
  using T = float;
  static __device__ void apply(T& a, T b) { a = fmaf(a, b, b); }
};
struct DoubleAdd {
  using T = double;
  static __device__ void apply(T& a, T b) { a += b; }
};
struct DoubleFma {
  using T = double;
  static __device__ void apply(T& a, T b) { a = fma(a, b, b); }
};
struct FloatToDouble {  // there and back: two conversions
  using T = float;
  static __device__ void apply(T& a, T) {
    asm volatile("{ .reg .f64 d; cvt.f64.f32 d, %0; cvt.rn.f32.f64 %0, d; }" : "+f"(a));
  }
};
struct IntegerAdd {
  using T = int;
  static __device__ void apply(T& a, T b) {
    asm volatile("add.s32 %0, %0, %1;" : "+r"(a) : "r"(b));
  }
};
struct ToBfloat16 {
  using T = float;
  static __device__ void apply(T& a, T b) {
    asm volatile("{ .reg .b32 p; cvt.rn.bf16x2.f32 p, %0, %1; mov.b32 %0, p; }" : "+f"(a) : "f"(b));
  }
};
struct ToHalf {
  using T = float;
  static __device__ void apply(T& a, T b) {
    asm volatile("{ .reg .b32 p; cvt.rn.f16x2.f32 p, %0, %1; mov.b32 %0, p; }" : "+f"(a) : "f"(b));
  }
};
struct FromHalf {
  using T = float;
  static __device__ void apply(T& a, T) {
    asm volatile("{ .reg .b16 l, h; mov.b32 {l, h}, %0; cvt.f32.f16 %0, l; }" : "+f"(a));
  }
};
struct Reciprocal {  // and an addition, which another unit does meanwhile
  using T = float;
  static __device__ void apply(T& a, T b) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    a = r + b;
  }
};

template <typename Unit>
__global__ void chains(typename Unit::T* out, long long* cycles) {
  using T = typename Unit::T;
  T a[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) a[i] = static_cast<T>(threadIdx.x + i + 1);
  const T b = static_cast<T>(blockIdx.x + 1);
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 8
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) Unit::apply(a[i], b);
  }
  __syncthreads();
  const long long end = clock64();
  T sum = a[0];
#pragma unroll
  for (int i = 1; i < kChains; ++i) sum += a[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
}

template <typename Unit>
void unit(const char* name, int multiprocessors, int per_step = 1) {
  constexpr int kAll = 1024;
  typename Unit::T* out;
  long long* cycles;
  CHECK(cudaMalloc(&out, sizeof(*out) * kAll * multiprocessors));
  CHECK(cudaMallocManaged(&cycles, sizeof(*cycles) * multiprocessors));
  seconds([&] { chains<Unit><<<multiprocessors, kAll>>>(out, cycles); });
  std::vector<long long> sorted(cycles, cycles + multiprocessors);
  std::sort(sorted.begin(), sorted.end());
  const double per_clock = double(kSteps) * kChains * kAll * per_step / sorted[multiprocessors / 2];
  std::printf("  \"per_clock_%s\": %.1f,\n", name, per_clock);
  CHECK(cudaFree(out));
  CHECK(cudaFree(cycles));
}

// ---- Memory ------------------------------------------------------------------------------------

__global__ void copy(const uint4* from, uint4* to, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
    uint4 value[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (i + u * step < count) value[u] = from[i + u * step];
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (i + u * step < count) to[i + u * step] = value[u];
    }
  }
}
__global__ void read(const uint4* from, uint4* to, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint4 sum = {};
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
    uint4 value[4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (i + u * step < count) value[u] = from[i + u * step];
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) sum.x ^= value[u].x ^ value[u].y ^ value[u].z ^ value[u].w;
  }
  if (sum.x == 0x12345678u) to[threadIdx.x] = sum;
}

void memory(int multiprocessors) {
  const int64_t most = int64_t{1} << 30;
  uint4 *from, *to, *other;
  CHECK(cudaMalloc(&from, most));
  CHECK(cudaMalloc(&to, most));
  CHECK(cudaMalloc(&other, 256 << 20));
  CHECK(cudaMemset(from, 1, most));
  CHECK(cudaMemset(to, 1, most));
  std::printf("  \"cold\": {");
  const int64_t sizes[] = {1 << 20,  4 << 20,   8 << 20,   16 << 20, 32 << 20,
                           64 << 20, 128 << 20, 256 << 20, most};
  for (const int64_t bytes : sizes) {
    const int64_t count = bytes / 16;
    const int blocks =
        static_cast<int>(std::min<int64_t>((count + 4 * kThreads - 1) / (4 * kThreads), 1 << 20));
    // The L2 full of clean lines of something else.
    const auto flush = [&] {
      read<<<8 * multiprocessors, kThreads>>>(other, to, (256 << 20) / 16);
    };
    const double copied = seconds([&] { copy<<<blocks, kThreads>>>(from, to, count); }, flush);
    const double only_read = seconds([&] { read<<<blocks, kThreads>>>(from, to, count); }, flush);
    std::printf(
        "%s\"%lld\": {\"copy_us\": %.2f, \"copy_TBs\": %.3f, \"read_us\": %.2f, \"read_TBs\": "
        "%.3f}",
        bytes == sizes[0] ? "" : ", ", static_cast<long long>(bytes), copied * 1e6,
        2 * bytes / copied / 1e12, only_read * 1e6, bytes / only_read / 1e12);
  }
  std::printf("},\n");
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  CHECK(cudaFree(other));
}

__global__ void chase(const unsigned* next, int steps, long long* cycles, unsigned* out) {
  unsigned at = 0;
  const long long begin = clock64();
  for (int i = 0; i < steps; ++i) at = __ldcg(next + at);
  *cycles = clock64() - begin;
  *out = at;
}

// Of lines that the L2 holds, or of lines that nobody has read since they were copied here.
void latency(const char* name, int64_t bytes, bool in_l2, int steps, double clock) {
  // A cycle through all lines of 128 bytes, far apart.
  const int64_t lines = bytes / 128;
  std::vector<unsigned> host(bytes / 4);
  const int64_t stride = 1000003 % lines;
  for (int64_t i = 0, at = 0; i < lines; ++i) {
    const int64_t to = (at + stride) % lines;
    host[at * 32] = static_cast<unsigned>(to * 32);
    at = to;
  }
  unsigned *next, *out;
  long long* cycles;
  CHECK(cudaMalloc(&next, bytes));
  CHECK(cudaMalloc(&out, 4));
  CHECK(cudaMallocManaged(&cycles, 8));
  CHECK(cudaMemcpy(next, host.data(), bytes, cudaMemcpyHostToDevice));
  for (int i = 0; i < (in_l2 ? 3 : 1); ++i) chase<<<1, 1>>>(next, steps, cycles, out);
  CHECK(cudaDeviceSynchronize());
  std::printf("  \"latency_%s_ns\": %.0f,\n", name, double(*cycles) / steps / clock * 1e9);
  CHECK(cudaFree(next));
  CHECK(cudaFree(out));
  CHECK(cudaFree(cycles));
}

// ---- Launches and barriers ------------------------------------------------------------------------

__global__ void empty() {}

double in_graph(int calls, const std::function<void(cudaStream_t)>& launch) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < calls; ++i) launch(stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  return seconds([&] { CHECK(cudaGraphLaunch(exec, stream)); }, [] {}, stream) / calls;
}

__global__ void cluster_barriers(int count, long long* cycles) {
  cg::this_cluster().sync();
  const long long begin = clock64();
  for (int i = 0; i < count; ++i) cg::this_cluster().sync();
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - begin;
}

// As in csrc/cuda/team.cuh. sleep: ns between two looks, 0 for none.
__global__ void team_barriers(int count, int team_size, unsigned* words, unsigned sleep,
                              long long* cycles) {
  unsigned* const word = words + blockIdx.x / team_size;
  cg::this_grid().sync();
  const long long begin = clock64();
  for (int i = 0; i < count; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      constexpr unsigned kHighest = 0x80000000u;
      const unsigned others = static_cast<unsigned>(team_size - 1);
      __threadfence();
      const unsigned before = atomicAdd(word, blockIdx.x % team_size == 0 ? kHighest - others : 1u);
      unsigned now = before;
      while (((now ^ before) & kHighest) == 0) {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        if (sleep != 0) __nanosleep(sleep);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - begin;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  int khz = 0;
  CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
  const double clock = khz * 1e3;
  const int all = device.multiProcessorCount;
  std::printf(
      "{\n  \"gpu\": \"%s\", \"multiprocessors\": %d, \"clock_MHz\": %.0f, \"l2_bytes\": %d,\n",
      device.name, all, clock / 1e6, device.l2CacheSize);
  unit<Fma>("fma", all);
  unit<IntegerAdd>("int_add", all);
  unit<DoubleAdd>("double_add", all);
  unit<DoubleFma>("double_fma", all);
  unit<FloatToDouble>("float_double", all, 2);
  unit<ToBfloat16>("to_bf16x2", all);
  unit<ToHalf>("to_f16x2", all);
  unit<FromHalf>("from_f16", all);
  unit<Reciprocal>("reciprocal", all);
  memory(all);
  latency("l2", 8 << 20, true, 50000, clock);
  latency("memory", int64_t{512} << 20, false, 50000, clock);
  std::printf("  \"launch_in_graph_us\": %.3f,\n",
              1e6 * in_graph(200, [](cudaStream_t s) { empty<<<1, 32, 0, s>>>(); }));
  std::printf("  \"launch_of_all_blocks_us\": %.3f,\n",
              1e6 * in_graph(200, [&](cudaStream_t s) { empty<<<2 * all, kThreads, 0, s>>>(); }));
  long long* cycles;
  CHECK(cudaMallocManaged(&cycles, 8));
  constexpr int kBarriers = 1000;
  std::printf("  \"cluster_barrier_ns\": {");
  CHECK(cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size = 1; size <= 16; size *= 2) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(all / size * size));
    config.blockDim = dim3(kThreads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    seconds([&] { CHECK(cudaLaunchKernelEx(&config, cluster_barriers, kBarriers, cycles)); });
    std::printf("%s\"%d\": %.0f", size == 1 ? "" : ", ", size, *cycles / (kBarriers * clock) * 1e9);
  }
  std::printf("},\n  \"team_barrier_ns\": {");
  unsigned* words;
  CHECK(cudaMalloc(&words, 8192 * 4));
  CHECK(cudaMemset(words, 0, 8192 * 4));
  bool first = true;
  const int grid = 2 * all;
  for (const unsigned sleep : {0u, 20u, 64u, 200u}) {
    for (int size : {2, 8, 32, 132, 264}) {
      if (size > grid) continue;
      int count = kBarriers;
      int used = size;
      unsigned s = sleep;
      void* arguments[] = {&count, &used, &words, &s, &cycles};
      seconds([&] {
        CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(team_barriers),
                                          dim3(grid / size * size), dim3(kThreads), arguments, 0,
                                          nullptr));
      });
      std::printf("%s\"%d, sleep %u\": %.0f", first ? "" : ", ", size, sleep,
                  *cycles / (kBarriers * clock) * 1e9);
      first = false;
    }
  }
  std::printf("}\n}\n");
  return 0;
}
