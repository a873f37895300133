// The kernels for every CPU of the architecture: SSE2 on x86-64, NEON on aarch64.
#define BNORM_EXT_ISA baseline
#include "kernels_impl.h"
