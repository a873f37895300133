// What a launch plan says, for bnorm_ext.explain(): plan.h needs no GPU.
#include "explain.h"

#include "checks.h"
#include "cuda/resident_plan.h"

namespace bnorm_ext {

pybind11::dict explain_plan(const at::Tensor& x, int tensors, int multiprocessors,
                            int shared_per_multiprocessor, int shared_per_block, bool clusters,
                            bool aligned, bool beside_collectives) {
  check_input("explain", "input", x);
  const Input in = resolve(x);
  cuda::DeviceLimits device;
  device.multiprocessors = multiprocessors;
  device.shared_per_multiprocessor = shared_per_multiprocessor;
  device.shared_per_block = shared_per_block;
  device.max_cluster = clusters ? cuda::kLargestCluster : 1;
  device.cooperative = true;
  device.beside_collectives = beside_collectives;
  const int bytes = static_cast<int>(x.element_size());
  const cuda::ResidentPlan plan =
      cuda::plan_resident(in.shape, bytes, aligned, tensors, device, cuda::ByLimits{device});
  const bool resident = plan.path != cuda::Path::TwoPass;
  const cuda::TilePlan walk =
      resident ? plan.tile_plan : cuda::plan_two_pass(in.shape, bytes, aligned, device);
  constexpr const char* kNames[] = {"two_pass", "block", "cluster", "grid"};
  pybind11::dict found;
  found["path"] = kNames[static_cast<int>(plan.path)];
  found["reason"] = plan.reason;
  constexpr const char* kMappings[] = {"channels_first", "channels_last", "channel_groups"};
  found["mapping"] = kMappings[static_cast<int>(walk.mapping)];
  found["channels_last"] = in.shape.layout == Layout::ChannelsLast;
  found["tiles"] = walk.tiles;
  found["team"] = walk.chunks;
  found["teams"] = resident ? plan.teams : walk.tiles;
  found["threads"] = cuda::kThreads;
  found["access_bytes"] = walk.width * bytes;
  found["shared_bytes"] = plan.shared_bytes;
  const int64_t channels = std::min<int64_t>(channels_per_tile(walk), in.shape.C);
  found["channels"] = channels;
  found["tile_bytes"] = in.shape.count() * channels * bytes * tensors;
  found["share_bytes"] =
      std::min(shared_per_block, shared_per_multiprocessor / cuda::kShares - cuda::kReservedBytes);
  return found;
}

}  // namespace bnorm_ext
