// The kernels for CPUs with AVX2, FMA and F16C; compiled with those instructions on.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with -mavx2 -mfma -mf16c"
#endif
#define BNORM_EXT_ISA avx2
#include "kernels_impl.h"
