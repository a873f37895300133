// A kernel with a mistake and a program that runs it in the emulator; README.md builds it.
#include <emulator.h>

#include <cstdio>

using bnorm_ext::cuda::dynamic_shared;
using bnorm_ext::cuda::Workspace;

__global__ void reverse(const float* in, Workspace<float> out) {
  const auto tile = dynamic_shared<float>(0);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = __ldg(in + i);
  // __syncthreads() is missing here.
  const float value = tile[63 - i];
  out[i] = value;
}

int main() {
  emulator::set_device("sm_90");
  emulator::set_seed(1);
  float* in = emulator::allocate<float>("in", 64, emulator::Role::kInput);
  float* out = emulator::allocate<float>("out", 64, emulator::Role::kWorkspace);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);

  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 64;
  config.dynamicSmemBytes = 64 * sizeof(float);
  cudaLaunchKernelEx(&config, reverse, in, Workspace<float>(out));
  std::fputs(emulator::report_text().c_str(), stdout);
}
