// Huge pages for large outputs.
//
// A tensor of 64 MB has 16,000 ordinary pages. Where the allocator has just got them from the
// system (above 32 MB it always does), their page faults take several times as long as the kernels.
// With huge pages there are 32.
//
// This is only advice: a system without huge pages, or with them set to `never`, ignores it, and
// `prctl(PR_SET_THP_DISABLE)` turns it off for a process.
#pragma once

#include <ATen/ATen.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace bnorm_ext {
namespace cpu {

// Nobody has written the memory of `out` yet.
inline void advise_huge_pages([[maybe_unused]] const at::Tensor& out) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge, last = (begin + out.nbytes()) / kHuge;
  if (last >= first + 2) {
    madvise(reinterpret_cast<void*>(first * kHuge), (last - first) * kHuge, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace cpu
}  // namespace bnorm_ext
