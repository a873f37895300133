// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include "../../../runner.h"

namespace c10 {
namespace cuda {

inline cudaStream_t getCurrentCUDAStream() {
  return runner::current_stream();
}

}  // namespace cuda
}  // namespace c10
