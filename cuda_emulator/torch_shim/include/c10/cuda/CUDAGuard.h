// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include <c10/core/Device.h>

#include "CUDAFunctions.h"

namespace c10 {
namespace cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace cuda
}  // namespace c10
