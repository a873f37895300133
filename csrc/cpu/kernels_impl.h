// The kernel table of one instruction set. kernels_<isa>.cpp defines BNORM_EXT_ISA as its name and
// includes this.
#pragma once

#include "backward_kernels.h"
#include "forward_kernels.h"
#include "kernels.h"

namespace bnorm_ext {
namespace cpu {

#define BNORM_JOIN(a, b) a##b
#define BNORM_NAME(a, b) BNORM_JOIN(a, b)
#define BNORM_STRING(a) #a
#define BNORM_TEXT(a) BNORM_STRING(a)

const KernelTable BNORM_NAME(kernels_, BNORM_EXT_ISA) = {
    BNORM_TEXT(BNORM_EXT_ISA),
    {moments<float>, moments<double>, moments<Half>, moments<BFloat16>},
    {apply<float>, apply<double>, apply<Half>, apply<BFloat16>},
    {sums<float>, sums<double>, sums<Half>, sums<BFloat16>},
    {dx<float>, dx<double>, dx<Half>, dx<BFloat16>},
    fence_stores,
};

}  // namespace cpu
}  // namespace bnorm_ext
