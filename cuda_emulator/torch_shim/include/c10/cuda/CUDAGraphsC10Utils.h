// In place of torch's header of this name, where csrc/cuda/*.cpp is compiled against the emulator.
#pragma once

#include "../../../runner.h"

namespace c10 {
namespace cuda {

enum class CaptureStatus { None, Active };

inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return runner::is_capturing() ? CaptureStatus::Active : CaptureStatus::None;
}

}  // namespace cuda
}  // namespace c10
