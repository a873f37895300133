// The kernels for CPUs with AVX-512 F, BW, DQ and VL; compiled with those instructions on.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__)
#error "compile this file with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
#endif
#define BNORM_EXT_ISA avx512
#include "kernels_impl.h"
