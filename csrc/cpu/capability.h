// Which of the compiled kernel tables this process uses.
#pragma once

#include <string>

#include "kernels.h"

namespace bnorm_ext {
namespace cpu {

// The best instruction set that was compiled and that this CPU has, or the one named by the
// environment variable BNORM_EXT_CPU_CAPABILITY. Chosen at the first call.
const KernelTable& kernels();

std::string capability();

}  // namespace cpu
}  // namespace bnorm_ext
