// Which compiled instruction set of the CPU kernels this process uses.
#pragma once

#include <string>

#include "kernels.h"

namespace bnorm_ext {
namespace cpu {

// The best that was compiled and that this CPU has, or a lower one named by the environment
// variable BNORM_EXT_CPU_CAPABILITY. Chosen at the first call.
const KernelTable& kernels();

std::string capability();

}  // namespace cpu
}  // namespace bnorm_ext
