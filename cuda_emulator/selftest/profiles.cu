// What a profile says of kernels whose stores and bank conflicts are known.
#include "selftest.h"

namespace {

using bnorm_ext::cuda::Bytes;
using bnorm_ext::cuda::dynamic_shared;

struct Pair {
  double a, b;
};

// Each thread writes one T, `stride` of them behind the one of the lane before.
template <typename T>
__global__ void strided(int stride) {
  const auto slot = dynamic_shared<T>(0);
  slot[static_cast<int>(threadIdx.x) * stride] = T{};
}

// All lanes read one word, then half of them another one.
__global__ void same_word(int) {
  const auto slot = dynamic_shared<int>(0);
  slot[threadIdx.x] = 1;
  __syncthreads();
  int sum = 0;
  for (unsigned i = 0; i < 1 + threadIdx.x % 2; ++i) sum += slot[32 * (1 - i)];
  static_cast<void>(sum);
}

__global__ void stores(unsigned* out) {
  const Bytes<4> value{{threadIdx.x}};
  unsigned* to = out + blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 40) {
    bnorm_ext::cuda::store_bytes_evict_first<4>(to, value);
  } else {
    bnorm_ext::cuda::store_bytes<4>(to, value);
  }
}

template <typename Parameter>
emulator::Profile profile_of(void (*kernel)(Parameter), Parameter parameter) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 16384;
  emulator::set_profiled(true);
  if (cudaLaunchKernelEx(&config, kernel, parameter) != cudaSuccess) return {};
  return emulator::profiles().back();
}

std::string differs(const char* what, long long is, long long expected) {
  if (is == expected) return "";
  return std::string(what) + ": " + std::to_string(is) + ", not " + std::to_string(expected) + "; ";
}

std::string check_bank_conflicts() {
  std::string wrong;
  constexpr int kFour = 2, kEight = 3, kSixteen = 4;  // log2 of bytes
  wrong += differs("floats", profile_of(strided<float>, 1).ways[kFour], 1);
  wrong += differs("every second float", profile_of(strided<float>, 2).ways[kFour], 2);
  wrong += differs("every 33rd float", profile_of(strided<float>, 33).ways[kFour], 1);
  wrong += differs("every 32nd float", profile_of(strided<float>, 32).ways[kFour], 32);
  wrong += differs("doubles", profile_of(strided<double>, 1).ways[kEight], 1);
  wrong += differs("every 4th double", profile_of(strided<double>, 4).ways[kEight], 4);
  wrong += differs("pairs", profile_of(strided<Pair>, 1).ways[kSixteen], 1);
  wrong += differs("every 8th pair", profile_of(strided<Pair>, 8).ways[kSixteen], 8);
  const emulator::Profile same = profile_of(same_word, 0);
  wrong += differs("one word for all", same.ways[kFour], 1);
  wrong += differs("no pairs", same.ways[kSixteen], 0);
  return wrong;
}

std::string check_stores() {
  auto* out = emulator::allocate<unsigned>("out", 128, emulator::Role::kOutput);
  const emulator::Profile profile = profile_of(stores, out);
  int l2 = 0;
  emulator::set_l2_bytes(1000);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0);
  return differs("stores", static_cast<long long>(profile.stores), 128) +
         differs("those that evict first", static_cast<long long>(profile.evict_first), 80) +
         differs("the L2", l2, 1000);
}

}  // namespace

void add_profiles(std::vector<Case>& cases) {
  cases.push_back({"bank_conflicts", check_bank_conflicts});
  cases.push_back({"stores", check_stores});
}
