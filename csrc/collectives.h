// Whether kernels of collectives may run on the GPU at the same time as this package's.
//
// For the whole process; bnorm_ext/_cuda.py sets it while torch.distributed is initialised with more
// than one rank. Plans are made with the value of that moment, and all of them are right.
#pragma once

#include <atomic>

namespace bnorm_ext {

inline std::atomic<bool> beside_collectives{false};

}  // namespace bnorm_ext
