#include "capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace bnorm_ext {
namespace cpu {
namespace {

const KernelTable& choose() {
  const KernelTable* available[3] = {&kernels_baseline};
  int count = 1;
#ifdef BNORM_EXT_X86_KERNELS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    available[count++] = &kernels_avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      available[count++] = &kernels_avx512;
    }
  }
#endif
  const char* wanted = std::getenv("BNORM_EXT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *available[count - 1];
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(available[i]->capability, wanted) == 0) return *available[i];
    known += std::string(i ? ", " : "") + available[i]->capability;
  }
  TORCH_CHECK_VALUE(false, "BNORM_EXT_CPU_CAPABILITY=", wanted,
                    " is not one of this CPU's: ", known);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

std::string capability() {
  return kernels().capability;
}

}  // namespace cpu
}  // namespace bnorm_ext
