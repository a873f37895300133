#include "resident.h"

#include <c10/cuda/CUDAFunctions.h>

#include <cstdlib>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "../collectives.h"

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

// All that a plan depends on.
struct PlanKey {
  int64_t N, C, S;
  uint64_t rest;  // everything else, in bytes and bits of its own

  PlanKey(const Input& in, bool is_aligned, int tensors, int device, const Wanted& wanted,
          bool beside)
      : N(in.shape.N), C(in.shape.C), S(in.shape.S) {
    const bool last = in.shape.layout == Layout::ChannelsLast;
    const auto byte = [](auto value, int which) {
      return static_cast<uint64_t>(value) << 8 * which;
    };
    rest = byte(device, 0) | byte(in.dtype, 1) | byte(wanted.path, 2) | byte(tensors, 3) |
           byte(last | is_aligned << 1 | wanted.any << 2 | beside << 3, 4);
  }
  bool operator==(const PlanKey& k) const {
    return N == k.N && C == k.C && S == k.S && rest == k.rest;
  }
};

struct PlanHash {
  size_t operator()(const PlanKey& k) const {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // spreads the bits of small numbers
    uint64_t hash = k.rest;
    for (const int64_t part : {k.N, k.C, k.S}) {
      hash = (hash ^ static_cast<uint64_t>(part)) * kOdd;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

class Plans {
 public:
  bool find(const PlanKey& key, ResidentPlan* plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(key);
    if (found == kept_.end()) return false;
    *plan = found->second;
    return true;
  }
  void keep(const PlanKey& key, const ResidentPlan& plan) {
    // Bounded, because a program with varying batches makes new shapes all the time.
    constexpr size_t kMost = 4096;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_.size() >= kMost) kept_.clear();
    kept_[key] = plan;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<PlanKey, ResidentPlan, PlanHash> kept_;
};

using CountBlocks = int64_t (*)(DType, const TilePlan&, Path, int, int);

ResidentPlan plan(const Input& in, bool is_aligned, int tensors, CountBlocks count_blocks) {
  static auto* plans = new Plans();  // never destroyed: threads may still run at exit
  const Wanted wanted = wanted_path();
  const bool beside = beside_collectives.load(std::memory_order_relaxed);
  const PlanKey key(in, is_aligned, tensors, c10::cuda::current_device(), wanted, beside);
  ResidentPlan plan;
  if (plans->find(key, &plan)) return plan;
  DeviceLimits device = limits();
  device.beside_collectives = beside;
  // Without the lock: CUDA may have to load the kernel.
  plan = plan_resident(
      in.shape, element_bytes(in), is_aligned, tensors, device,
      [&](const TilePlan& tile_plan, Path path, int team, int shared_bytes) {
        return count_blocks(in.dtype, tile_plan, path, team, shared_bytes);
      },
      wanted);
  plans->keep(key, plan);
  return plan;
}

}  // namespace

ResidentPlan plan_forward(const Input& in, bool is_aligned) {
  return plan(in, is_aligned, 1, resident_forward_blocks);
}
ResidentPlan plan_backward(const Input& in, bool is_aligned) {
  return plan(in, is_aligned, 2, resident_backward_blocks);
}

TeamMemory::TeamMemory(const ResidentPlan& plan, const Input& in, bool counts_tiles) {
  const int64_t teams = plan.path == Path::Grid && plan.tile_plan.chunks > 1 ? plan.teams : 0;
  const auto options = in.tensor.options();
  if (teams > 0) {
    const int64_t pairs = 2 * plan.blocks() * channels_per_tile(plan.tile_plan);
    partials_ = at::empty({pairs * kPairBytes}, options.dtype(at::kByte));
    phases_ = SemaphoreMemory(teams, options, SemaphoreUse::Phases);
    staging_.partials = static_cast<Pair*>(partials_.data_ptr());
    staging_.phases = phases_.words();
  }
  if (teams + counts_tiles == 0) return;
  semaphores_ = SemaphoreMemory(teams + counts_tiles, options);
  staging_.semaphores = semaphores_.words();
  if (counts_tiles) tiles_done_ = staging_.semaphores + teams;
}

bool is_launched(cudaError_t error) {
  switch (error) {
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorInvalidClusterSize:
    case cudaErrorNotSupported:
    case cudaErrorNotPermitted:
      cudaGetLastError();  // not the next caller's
      return false;
    default:
      C10_CUDA_CHECK(error);
      return true;
  }
}

}  // namespace cuda
}  // namespace bnorm_ext
