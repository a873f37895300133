// The table of the vectorised CPU kernels, compiled once per instruction set. capability.h chooses
// one table at run time.
//
// A kernel is single-threaded. It works on one span of a range of channels; plan.h says which ones
// and parallel.h calls it. Free of torch headers.
#pragma once

#include <cstdint>

#include "params.h"

namespace bnorm_ext {
namespace cpu {

struct KernelTable {
  const char* capability;  // "baseline", "avx2" or "avx512"
  // Indexed by DType. They work on channels [c0, c1): for `moments` and `sums` at most
  // kMaxChannelsPerCall, and all of them where samples_per_summed_row() exceeds 1; for `apply` and
  // `dx` all of them where is_folded() (plan.h). out: [c1 - c0].
  void (*moments[4])(const ForwardParams&, const Span&, int64_t c0, int64_t c1, Moments* out);
  void (*apply[4])(const ForwardParams&, const Span&, int64_t c0, int64_t c1);
  void (*sums[4])(const BackwardParams&, const Span&, int64_t c0, int64_t c1, Sums* out);
  void (*dx[4])(const BackwardParams&, const Span&, int64_t c0, int64_t c1);
  // Makes this thread's nontemporal stores visible to other threads. It waits for the memory, so
  // it is called once per thread, after the last chunk.
  void (*fence)();
};

extern const KernelTable kernels_baseline;
// Compiled on x86-64 only, where BNORM_EXT_X86_KERNELS is defined for the host files.
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;

}  // namespace cpu
}  // namespace bnorm_ext
