// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include <emulator.h>

namespace c10 {
namespace cuda {

// Nothing that host code does here is forbidden during a capture.
struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode) {}
  ~CUDAStreamCaptureModeGuard() {}
};

}  // namespace cuda
}  // namespace c10
