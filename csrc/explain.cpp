// What a launch plan says, for bnorm_ext.explain(): plan.h needs no GPU.
#include "explain.h"

#include "checks.h"
#include "cuda/resident_plan.h"

namespace bnorm_ext {

pybind11::dict explain_plan(const at::Tensor& x, int tensors, int multiprocessors,
                            int shared_per_multiprocessor, int shared_per_block, int l2_bytes,
                            int gigabytes_per_second, int clock_mhz, bool clusters, bool aligned,
                            bool beside_collectives) {
  check_input("explain", "input", x);
  const Input in = resolve(x);
  cuda::DeviceLimits device;
  device.multiprocessors = multiprocessors;
  device.shared_per_multiprocessor = shared_per_multiprocessor;
  device.shared_per_block = shared_per_block;
  device.l2_bytes = l2_bytes;
  device.gigabytes_per_second = gigabytes_per_second;
  device.clock_mhz = clock_mhz;
  device.max_cluster = clusters ? cuda::kLargestCluster : 1;
  device.cooperative = true;
  device.beside_collectives = beside_collectives;
  const int bytes = static_cast<int>(x.element_size());
  const cuda::ByLimits by_limits{device, tensors};
  const cuda::ResidentPlan plan =
      cuda::plan_resident(in.shape, bytes, aligned, tensors, device, by_limits);
  const bool one_launch = plan.path != cuda::Path::TwoPass;
  const cuda::TilePlan walk =
      one_launch ? plan.tile_plan : cuda::plan_two_pass(in.shape, bytes, aligned, device);
  constexpr const char* kNames[] = {"two_pass", "block", "cluster", "grid"};
  pybind11::dict found;
  found["path"] = kNames[static_cast<int>(plan.path)];
  found["reason"] = plan.reason;
  found["on_chip"] = plan.vectors > 0;
  constexpr const char* kMappings[] = {"channels_first", "channels_last", "channel_groups"};
  found["mapping"] = kMappings[static_cast<int>(walk.mapping)];
  found["channels_last"] = in.shape.layout == Layout::ChannelsLast;
  found["tiles"] = walk.tiles;
  found["team"] = walk.chunks;
  found["teams"] = one_launch ? plan.teams : walk.tiles;
  found["threads"] = cuda::kThreads;
  found["access_bytes"] = walk.width * bytes;
  found["shared_bytes"] = plan.shared_bytes;
  const int64_t channels = std::min<int64_t>(channels_per_tile(walk), in.shape.C);
  found["channels"] = channels;
  found["tile_bytes"] = in.shape.count() * channels * bytes * tensors;
  found["share_bytes"] =
      std::min(shared_per_block, shared_per_multiprocessor / cuda::kShares - cuda::kReservedBytes);
  const auto predicted = [&](const cuda::ResidentPlan& p) {
    const int team = static_cast<int>(p.tile_plan.chunks);
    const int64_t at_once =
        p.path == cuda::Path::TwoPass ? 0 : by_limits(p.tile_plan, p.path, team, p.shared_bytes);
    return cuda::predicted(p, in.shape, bytes, aligned, tensors, device, at_once);
  };
  const cuda::Cost cost = predicted(plan);
  pybind11::dict times;
  times["memory"] = cost.memory;
  times["latency"] = cost.latency;
  times["instructions"] = cost.instructions;
  times["waiting"] = cost.waiting;
  found["times"] = times;
  found["two_passes"] = predicted(cuda::two_passes("")).total();
  const double least = static_cast<double>(in.shape.numel()) * bytes * (tensors + 1);
  found["floor"] = cuda::kLaunch + least / cuda::copy_rate(device);
  const cuda::Instructions count =
      cuda::instructions_of(plan.vectors > 0, tensors, walk.width, bytes);
  found["instructions"] = pybind11::make_tuple(count.sums, count.write);
  return found;
}

}  // namespace bnorm_ext
