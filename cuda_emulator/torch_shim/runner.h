// The operators with csrc/cuda/backend.cpp behind them on CPU tensors, the kernels in the emulator.
//
// A session is one case: device, seed, then torch calls whose tensors all live in the emulator's
// guarded memory, then the reports. tests/common/emulated.py drives it; the host files reach it
// through the headers in include/.
#pragma once

#include <emulator.h>

namespace runner {

cudaStream_t current_stream();

}  // namespace runner

#define RUNNER_API __attribute__((visibility("default")))
