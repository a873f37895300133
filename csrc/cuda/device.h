// The current device: what is asked of it once.
#pragma once

#include "plan.h"

namespace bnorm_ext {
namespace cuda {

const DeviceLimits& limits();

// Whether this build has code for it: a binary, or PTX that its driver can compile.
bool has_code();

}  // namespace cuda
}  // namespace bnorm_ext
