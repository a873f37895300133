// The operators with csrc/cuda/backend.cpp behind them on CPU tensors, the kernels in the emulator.
//
// A session is one case: device, seed, then torch calls whose tensors all live in the emulator's
// guarded memory, then the reports. tests/emulated.py drives it; the host files reach it through
// the headers in runner_shim/.
#pragma once

#include <emulator.h>

namespace runner {

bool is_capturing();

// Another one in each session, since what the host files keep per stream dies with the session.
cudaStream_t current_stream();

}  // namespace runner
