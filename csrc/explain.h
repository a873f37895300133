// The launch plan of a tensor on a GPU with these limits, by name; x may be a meta tensor.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace bnorm_ext {

// tensors: that are read, 1 forward, 2 backward. shared_*: bytes. l2_bytes, beside_collectives: as in
// DeviceLimits.
pybind11::dict explain_plan(const at::Tensor& x, int tensors, int multiprocessors,
                            int shared_per_multiprocessor, int shared_per_block, int l2_bytes,
                            bool clusters, bool aligned, bool beside_collectives);

}  // namespace bnorm_ext
