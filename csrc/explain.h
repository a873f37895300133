// The launch plan of a tensor on a GPU with these limits, by name; x may be a meta tensor.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace bnorm_ext {

// tensors: that are read, 1 forward, 2 backward. shared_*: bytes. l2_bytes and what follows it: as in
// DeviceLimits. The entries "times", "two_passes" and "floor" are predicted, in microseconds: the contributions
// to the time by this plan, the time by two passes, and that of an empty launch and the fewest bytes.
pybind11::dict explain_plan(const at::Tensor& x, int tensors, int multiprocessors,
                            int shared_per_multiprocessor, int shared_per_block, int l2_bytes,
                            int gigabytes_per_second, int clock_mhz, bool clusters, bool aligned,
                            bool beside_collectives);

}  // namespace bnorm_ext
