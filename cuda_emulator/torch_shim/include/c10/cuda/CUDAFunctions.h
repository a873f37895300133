// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include <c10/core/Device.h>
#include <emulator.h>

namespace c10 {
namespace cuda {

inline DeviceIndex current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return static_cast<DeviceIndex>(device);
}

}  // namespace cuda
}  // namespace c10
