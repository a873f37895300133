#include "resident.h"

#include <c10/cuda/CUDAFunctions.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "../collectives.h"
#include "resident_plan.h"

namespace bnorm_ext {
namespace cuda {
namespace {

Wanted wanted_path() {
  const char* name = std::getenv("BNORM_EXT_CUDA_PATH");
  if (name == nullptr || *name == '\0') return {};
  const std::string_view path = name;
  if (path == "two_pass") return {false, Path::TwoPass};
  if (path == "block") return {false, Path::Block};
  if (path == "cluster") return {false, Path::Cluster};
  TORCH_CHECK_VALUE(path == "grid", "BNORM_EXT_CUDA_PATH is '", path,
                    "', but must be two_pass, block, cluster or grid");
  return {false, Path::Grid};
}

using CountBlocks = int64_t (*)(DType, const TilePlan&, bool, Path, int, int);

ResidentPlan plan(const Input& in, bool is_aligned, bool plain, int tensors,
                  CountBlocks count_blocks) {
  const Wanted wanted = wanted_path();
  const bool beside = beside_collectives.load(std::memory_order_relaxed);
  const Shape& s = in.shape;
  // All that a plan depends on; the limits follow from the device.
  const auto key =
      std::make_tuple(s.N, s.C, s.S, s.layout, in.dtype, is_aligned, plain, tensors, wanted.any,
                      wanted.path, beside, static_cast<int>(c10::cuda::current_device()));
  // Never destroyed: threads may still run at exit.
  static auto* kept = new std::map<decltype(key), ResidentPlan>();
  static auto* mutex = new std::mutex();
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    const auto found = kept->find(key);
    if (found != kept->end()) return found->second;
  }
  DeviceLimits device = limits();
  device.beside_collectives = beside;
  // Without the lock: CUDA may have to load the kernel.
  const ResidentPlan plan = plan_resident(
      s, element_bytes(in), is_aligned, tensors, device,
      [&](const TilePlan& tile_plan, Path path, int team, int shared_bytes) {
        return count_blocks(in.dtype, tile_plan, plain, path, team, shared_bytes);
      },
      wanted);
  // Bounded, because a program with varying batches makes new shapes all the time.
  constexpr size_t kMost = 4096;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (kept->size() >= kMost) kept->clear();
  (*kept)[key] = plan;
  return plan;
}

}  // namespace

ResidentPlan plan_forward(const Input& in, bool is_aligned, bool plain) {
  return plan(in, is_aligned, plain, 1, resident_forward_blocks);
}
ResidentPlan plan_backward(const Input& in, bool is_aligned, bool plain) {
  return plan(in, is_aligned, plain, 2, resident_backward_blocks);
}

TeamMemory::TeamMemory(const ResidentPlan& plan, const Input& in, bool counts_tiles) {
  const int64_t teams = plan.path == Path::Grid && plan.tile_plan.chunks > 1 ? plan.teams : 0;
  const auto options = in.tensor.options();
  if (teams > 0) {
    const int64_t pairs = 2 * (plan.blocks() + teams) * channels_per_tile(plan.tile_plan);
    partials_ = at::empty({pairs * kPairBytes}, options.dtype(at::kByte));
    phases_ = SemaphoreMemory(teams, options, SemaphoreUse::Phases);
    staging_.partials = static_cast<Pair*>(partials_.data_ptr());
    staging_.phases = phases_.words();
  }
  if (!counts_tiles) return;
  semaphores_ = SemaphoreMemory(1, options);
  tiles_done_ = semaphores_.words();
}

bool is_launched(cudaError_t error, const char* kernel) {
  switch (error) {
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorInvalidClusterSize:
    case cudaErrorNotSupported:
    case cudaErrorNotPermitted:
      cudaGetLastError();  // not the next caller's
      return false;
    default:
      check_launch(error, kernel);
      return true;
  }
}

}  // namespace cuda
}  // namespace bnorm_ext
