// Host side of the resident paths: which one a call takes, and what its blocks exchange values
// through.
#pragma once

#include "host.h"

namespace bnorm_ext {
namespace cuda {

// Plans for the current device, kept: the CUDA runtime is asked once how many blocks are resident.
// BNORM_EXT_CUDA_PATH=two_pass, block, cluster or grid asks for one path where it is possible.
ResidentPlan plan_forward(const Input& in, bool is_aligned, bool plain);
ResidentPlan plan_backward(const Input& in, bool is_aligned, bool plain);

// Staging memory of the teams, and one semaphore more where tiles have to be counted.
class TeamMemory {
 public:
  TeamMemory(const ResidentPlan& plan, const Input& in, bool counts_tiles);
  const Staging& operator*() const { return staging_; }
  unsigned* tiles_done() const { return tiles_done_; }

 private:
  Tensor partials_;
  SemaphoreMemory semaphores_, phases_;
  Staging staging_;
  unsigned* tiles_done_ = nullptr;
};

// Whether a launch is running. False where the device has refused it for its clusters or its
// cooperation (MPS, MIG, green contexts leave less of the device than the plan counted on), which
// two passes need not. Throws for every other error, as check_launch.
bool is_launched(cudaError_t error, const char* kernel);

}  // namespace cuda
}  // namespace bnorm_ext
