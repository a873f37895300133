// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include <c10/util/Exception.h>
#include <emulator.h>

#define C10_CUDA_CHECK(expression)                                                  \
  do {                                                                              \
    const cudaError_t error_ = (expression);                                        \
    TORCH_CHECK(error_ == cudaSuccess, "CUDA error: ", cudaGetErrorString(error_)); \
  } while (false)
